"""From content to tokens, under the tokenizer and the chat template of one model.

Every model reads the same content in its own way: the policy and each reward model have a `ChatFormat` of
their own. Text (TRL's standard format) is tokenised as it stands; messages go through the chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.types import Content, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HH = "hh"
PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


class ChatFormat:
    """How one model reads prompts and responses.

    For every content and response, `prompt_tokens(c) + response_tokens(c, r)` is the text to train on, and
    `prompt_tokens(c)` is exactly what is given to the policy when it samples. `response_tokens` ends with a
    token of `end_tokens()`, so a policy trained on them stops where the sampler looks for a stop.

    `owner` ("policy", "reward model 'helpful'") is named in errors. `template` is a Jinja template, a file
    that holds one, or "hh": messages as an hh-rlhf transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."), which
    is then tokenised as text. Without it the tokenizer's own template is used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, owner: str, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.owner = owner
        model = re.fullmatch(r"reward model '(.+)'", owner)
        self.key = f"reward_models.{model[1]}.chat_template" if model else f"{owner}.chat_template"
        self.template = self._template(template)

    def prompt_tokens(self, content: Content) -> list[int]:
        """What the model reads before a response. Text: with the tokenizer's special tokens, except an EOS
        that it appends. Messages: the template with the generation prompt."""
        content = self._text_or_messages(content)
        if not isinstance(content, str):
            return self._apply(content, generation_prompt=True)
        tokens, eos = self._tokens(content), self.tokenizer.eos_token_id
        appended = tokens[-1:] == [eos] and self._tokens(content, special=False)[-1:] != [eos]
        return tokens[:-1] if appended else tokens

    def response_tokens(self, content: Content, response: str) -> list[int]:
        """What follows the prompt's tokens in training, with the end of the turn.

        Text: the response alone, without other special tokens, and EOS. Messages: what the template renders
        after the prompt, up to the end-of-turn token. Whitespace that the template puts after that token is
        left out: nobody samples it. A template without an end-of-turn token gets EOS.
        """
        prompt = self._text_or_messages(content)
        if isinstance(prompt, str):
            return self._with_eos(self._tokens(self._continuation(content, response), special=False))
        start = self._apply(prompt, generation_prompt=True)
        whole = self._apply([*prompt, {"role": "assistant", "content": response}])
        if whole[: len(start)] != start:
            same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(whole))
            raise ValueError(
                f"{self.owner}: under the chat template the conversation does not begin with the prompt's "
                f"tokens: after {same} tokens the prompt goes on with {self._decode(start[same:])!r} and the "
                f"conversation with {self._decode(whole[same : len(start) + 1])!r}; set {self.key} to a "
                f"template that renders the prompt the same way in both"
            )
        turn = whole[len(start) :]
        ended = self._without_trailing_space(turn)
        if ended and ended[-1] in {self.tokenizer.eos_token_id, self._end_of_turn}:
            return ended
        return self._with_eos(turn)

    def conversation_tokens(self, content: Content, response: str) -> list[int]:
        """What a reward model scores; the same tokens as TRL's RewardTrainer trains on.

        Text: prompt and response as one text, with EOS after it if the response does not end with it and the
        tokenizer has one. Messages: all that the template renders.
        """
        prompt = self._text_or_messages(content)
        if isinstance(prompt, str):
            response, eos = self._continuation(content, response), self.tokenizer.eos_token or ""
            return self._tokens(prompt + response + ("" if response.endswith(eos) else eos))
        return self._apply([*prompt, {"role": "assistant", "content": response}])

    def end_tokens(self) -> list[int]:
        """The tokens that end a response: EOS, and the template's end-of-turn token where it is another."""
        return sorted({self.tokenizer.eos_token_id, self._end_of_turn} - {None})

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The special token with which the template ends the assistant's turn, if it has one."""
        if self.template is None or self.template == HH:
            return None
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        last = self._without_trailing_space(self._apply(PROBE))[-1]
        is_eos, is_unknown = last == self.tokenizer.eos_token_id, last == self.tokenizer.unk_token_id
        return last if is_eos or (last in special and not is_unknown) else None

    def _template(self, template: str | None) -> str | None:
        if template is None:
            return self.tokenizer.chat_template
        if template == HH or "{" in template:
            return template
        if not (path := Path(template).expanduser()).is_file():
            raise ValueError(f"{self.key}={template}: no such file; give a file, a Jinja template or {HH!r}")
        return path.read_text(encoding="utf-8")

    def _text_or_messages(self, content: Content) -> str | list[Message]:
        if isinstance(content, str):
            return content
        if self.template is None:
            raise ValueError(
                f"{self.owner}: the data is conversational, but the tokenizer has no chat template; "
                f"set {self.key}=... to a Jinja template, a file that holds one, or {HH!r} (transcripts)"
            )
        return self._transcript(content) if self.template == HH else list(content)

    def _transcript(self, messages: Sequence[Message]) -> str:
        speakers = {"user": "Human", "assistant": "Assistant"}
        if unknown := {message["role"] for message in messages} - set(speakers):
            raise ValueError(
                f"{self.owner}: an hh-rlhf transcript has no {min(unknown)!r} turn; drop it from the data or "
                f"set {self.key} to a Jinja template"
            )
        turns = (f"\n\n{speakers[message['role']]}: {message['content']}" for message in messages)
        return "".join(turns) + "\n\nAssistant:"

    def _continuation(self, content: Content, response: str) -> str:
        """The response as it continues the prompt's text: in a transcript a space comes first, unless the
        response has one (a sampled response does)."""
        spaced = isinstance(content, str) or not response or response[0].isspace()
        return response if spaced else f" {response}"

    def _apply(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:  # templates refuse what they do not know: roles, their order
            raise ValueError(
                f"{self.owner}: the chat template failed ({error}); set {self.key} or fix the data"
            ) from error

    def _tokens(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _without_trailing_space(self, tokens: list[int]) -> list[int]:
        end = len(tokens)
        while end and not self._decode(tokens[end - 1 : end]).strip():
            end -= 1
        return tokens[:end]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def _with_eos(self, tokens: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                f"{self.owner}: responses cannot end: the tokenizer has no EOS token; give it one"
            )
        return tokens if tokens[-1:] == [eos] else [*tokens, eos]

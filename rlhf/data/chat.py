"""From content to tokens and back, under the tokenizer and the chat template of one model.

Every model reads the same content in its own way: the policy and each reward model have a `ChatFormat` of
their own. Text (TRL's standard format) is tokenised as it stands; messages go through the chat template.

What messages and responses say is text: a control token that they spell ("<|im_end|>") is read letter by letter,
whoever reads it. A plain-text prompt may be the work of a template, so there it is the token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from rlhf.data.decode import text_after
from rlhf.data.literal import TextReader
from rlhf.data.template import Template
from rlhf.types import Content, Message

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class ChatFormat:
    """How one model reads prompts and responses.

    For every content and response, `prompt_tokens(c) + response_tokens(c, r)` is the text to train on, and
    `prompt_tokens(c)` is exactly what is given to the policy when it samples. `response_tokens` ends with a
    token of `end_tokens()`, so a policy trained on them stops where the sampler looks for a stop.
    `response_texts` gives sampled tokens back as the `r` that every model's `conversation_tokens` takes.

    A prompt whose last message is the assistant's is continued: prompt and response are one message.

    `owner` ("policy", "reward model 'helpful'") is named in errors; `template` as in `Template`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, owner: str, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.owner = owner
        self.template = Template(tokenizer, owner, template)

    def prompt_tokens(self, content: Content) -> list[int]:
        """What the model reads before a response. Text: with the tokenizer's special tokens, except an EOS
        that it appends. Messages: the template with the generation prompt."""
        text = self._prompt(content)
        if not self._plain(content):
            return self._reader.tokens(text)
        (first, last), tokens = self._around, self._reader.tokens(text)
        return [*_unless_there(first, tokens), *tokens, *(i for i in last if i != self._eos)]

    def response_tokens(self, content: Content, response: str) -> list[int]:
        """What follows the prompt's tokens in training, with the end of the turn.

        Text: the response alone, without other special tokens, and EOS. Messages: what the template renders
        after the prompt, up to the end-of-turn token. Whitespace that the template puts after that token is
        left out: nobody samples it. A template without an end-of-turn token gets EOS.
        """
        turn = self._continuation(self._prompt(content), self._conversation(content, response))
        if self._plain(content):
            return self._with_eos(turn)
        ended = self.template.without_trailing_space(turn)
        if ended and ended[-1] in {self._eos, self.template.end_of_turn}:
            return ended
        return self._with_eos(turn)

    def conversation_tokens(self, content: Content, response: str | Sequence[Message]) -> list[int]:
        """What a reward model scores; the same tokens as TRL's RewardTrainer trains on.

        Text: prompt and response as one text with the tokenizer's special tokens, and EOS if it has one. Messages:
        all that the template renders. The response may be several turns.
        """
        tokens = self._reader.tokens(self._conversation(content, response))
        if not self._plain(content):
            return tokens
        (first, last), eos = self._around, self._eos
        ended = tokens if eos is None else self._with_eos(tokens)
        return [*_unless_there(first, tokens), *ended, *(i for i in last if i != eos)]

    def response_texts(
        self,
        contents: Sequence[Content],
        prompts: Sequence[Sequence[int]],
        group: Iterable[int],
        responses: Iterable[Sequence[int]],
        ends: Collection[int],
    ) -> tuple[str, ...]:
        """The texts of sampled responses: what their tokens add to the prompt's, without the token that ended them.

        What the template itself writes before and after what the assistant says is not of the text either: a
        template writes it again. Other special tokens stay in the text as they are spelled.

        Args:
            contents, prompts: what was asked and its `prompt_tokens`.
            group: for each response, the number of its prompt.
            ends: tokens that end a response.
        """
        frames = [self._frame(content) for content in contents]
        texts = []
        for g, tokens in zip(group, responses, strict=True):
            opening, closing = frames[g]
            said = [int(i) for i in tokens if i <= self._last]  # a policy's table may be padded
            end = self._decode([said.pop()]) if said and said[-1] in ends else None
            text = text_after(self.tokenizer, prompts[g], said).removeprefix(opening)
            texts.append(text if end is None else _without(text, closing, end))
        return tuple(texts)

    def end_tokens(self) -> list[int]:
        """The tokens that end a response: EOS, and the template's end-of-turn token where it is another."""
        return sorted(i for i in {self._eos, self.template.end_of_turn} if i is not None)

    def check_table(self, model: PretrainedConfig, contents: Iterable[Content], answers: bool = True) -> None:
        """Refuses a tokenizer or template that uses tokens beyond the embedding table of a model of this
        configuration.

        Tokens that are only there (a padding token, say) may lie beyond it: no text is read as them. Without `answers`
        the model is given prompts only, and samples no token beyond its table: then its responses may have no end,
        which the log says.
        """
        size = getattr(
            model.get_text_config(), "vocab_size", math.inf
        )  # some read characters without a table
        beyond = {i: token for token, i in self.tokenizer.get_vocab().items() if i >= size}
        if not beyond:
            return
        used = {i for i, token in beyond.items() if token not in self.template.control}
        ends = set(self.end_tokens())
        if answers:
            used |= {i for c in contents for i in self.conversation_tokens(c, "Hello")} & beyond.keys()
            used |= ends & beyond.keys()
        else:
            used |= {i for c in contents for i in self.prompt_tokens(c)} & beyond.keys()
            if ends and ends <= beyond.keys():
                named = ", ".join(f"{beyond[i]!r} ({i})" for i in sorted(ends))
                log.warning(
                    "%s: responses end at rollout.max_new_tokens only: %s is beyond its embedding table of %d rows",
                    self.owner,
                    named,
                    size,
                )
        if used:
            raise ValueError(
                f"{self.owner}: its tokenizer uses the token {beyond[min(used)]!r} ({min(used)}), but its embedding "
                f"table has {size} rows; call resize_token_embeddings on the model, or take the tokenizer or "
                f"{self.template.key} that belongs to it"
            )

    @cached_property
    def _eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    @cached_property
    def _reader(self) -> TextReader:
        return TextReader(self.tokenizer, self.template.control, self.owner)

    @cached_property
    def _last(self) -> int:
        """The last token that the tokenizer knows."""
        return max(self.tokenizer.get_vocab().values())

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        alone, whole = self._read("a"), self.tokenizer("a")["input_ids"]
        at = next(i for i in range(len(whole) + 1) if whole[i : i + len(alone)] == alone)
        return whole[:at], whole[at + len(alone) :]

    def _frame(self, content: Content) -> tuple[str, str]:
        """The text before and after what a response to this prompt says, which is not of the message."""
        if isinstance(content, str):
            return self.template.lost_space(content), ""
        if self.template.transcript:
            return "" if content[-1]["role"] == "assistant" else " ", ""
        if content[-1]["role"] != "assistant":
            return self.template.opening, self.template.closing
        said = content[-1]["content"]
        space = said[len(said.rstrip()) :]  # some templates trim it, so that the response begins with it
        return "" if self.template.prompt(content).endswith(space) else space, self.template.closing

    def _plain(self, content: Content) -> bool:
        """Whether the model reads plain text: the content is, or a transcript is made of it."""
        return isinstance(content, str) or self.template.transcript

    def _prompt(self, content: Content) -> str:
        """The prompt's text, in the `TextReader`'s marks."""
        if isinstance(content, str):
            return content
        return self.template.prompt(self._reader.marked(list(content)))

    def _conversation(self, content: Content, response: str | Sequence[Message]) -> str:
        if isinstance(content, str):
            assert isinstance(response, str), "the response to plain text is plain text"
            # Data sets in TRL's standard format may end responses with EOS.
            return self._reader.joined(content, response.removesuffix(self.tokenizer.eos_token or ""))
        turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
        messages = [*content]
        if messages[-1]["role"] == turns[0]["role"] == "assistant":
            begun = messages.pop()
            turns[0] = {**begun, **turns[0], "content": begun["content"] + turns[0]["content"]}
        return self.template.conversation(self._reader.marked([*messages, *turns]))

    def _continuation(self, prompt: str, whole: str) -> list[int]:
        """The tokens of the whole text after those of the prompt.

        Where a token of the whole text would reach over the border, what follows the prompt is read by itself, in
        the way that gives its text back after the prompt's tokens: some tokenizers put a space before every text.
        """
        start, complete = self._reader.tokens(prompt), self._reader.tokens(whole)
        if complete[: len(start)] == start:
            return complete[len(start) :]
        if not whole.startswith(prompt):
            self._refuse(start, complete)
        rest = whole[len(prompt) :]
        alone, line, after = (self._reader.tokens(text) for text in (rest, "\n", f"\n{rest}"))
        ways = [alone, after[len(line) :]] if after[: len(line)] == line else [alone]
        same = (way for way in ways if text_after(self.tokenizer, start, way) == self._reader.plain(rest))
        return next(same, alone)

    def _refuse(self, start: list[int], whole: list[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"{self.owner}: under the chat template the conversation does not begin with the prompt's "
            f"tokens: after {same} tokens the prompt goes on with {self._decode(start[same:])!r} and the "
            f"conversation with {self._decode(whole[same : len(start) + 1])!r}; set {self.template.key} to a "
            f"template that renders the prompt the same way in both"
        )

    def _read(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def _with_eos(self, tokens: list[int]) -> list[int]:
        if self._eos is None:
            raise ValueError(
                f"{self.owner}: responses cannot end: the tokenizer has no EOS token; give it one"
            )
        return tokens if tokens[-1:] == [self._eos] else [*tokens, self._eos]


def _without(text: str, closing: str, end: str) -> str:
    """The text without what the template closes a turn with, before the token `end`, all of it or less its space."""
    written = closing.rpartition(end)[0] if end in closing else closing
    for part in (written, written.rstrip()):
        if part and text.endswith(part):
            return text.removesuffix(part)
    return text


def _unless_there(first: list[int], tokens: list[int]) -> list[int]:
    """The tokens to put before a text: none if the text begins with them itself."""
    return [] if tokens[: len(first)] == first else first

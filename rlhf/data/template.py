"""Messages to text, by the chat template of one model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HH = "hh"
SPEAKERS = {"user": "Human", "assistant": "Assistant"}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


class Template:
    """The template of one model: a Jinja template, the tokenizer's own, or "hh": an hh-rlhf transcript
    ("\\n\\nHuman: ...\\n\\nAssistant: ...").

    Args:
        owner: "policy", "reward model 'helpful'"; named in errors.
        given: a Jinja template, a file that holds one, the name of one of the tokenizer's, or "hh"; None: the
            tokenizer's own, of several the one that is called "default".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, owner: str, given: str | None) -> None:
        self.tokenizer, self.owner = tokenizer, owner
        model = re.fullmatch(r"reward model '(.+)'", owner)
        self.key = f"reward_models.{model[1]}.chat_template" if model else f"{owner}.chat_template"
        self.source = self._source(given)
        self._kept: set[str] = set()  # roles whose messages were seen in what the template renders

    @property
    def transcript(self) -> bool:
        """Whether it writes a transcript, which is then read as plain text."""
        return self.source == HH

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text before a response: with the generation prompt, or up to the end of what the last message says
        if that is the assistant's (the response continues it)."""
        continued = messages[-1]["role"] == "assistant"
        self._check_roles(messages)
        if self.transcript:
            return self._transcript(messages) + "\n\nAssistant:" * (not continued)
        return self._render(messages, add_generation_prompt=not continued, continue_final_message=continued)

    def conversation(self, messages: Sequence[Message]) -> str:
        self._check_roles(messages)
        return self._transcript(messages) if self.transcript else self._render(messages)

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token with which the template ends the assistant's turn, if it has one."""
        if self.source is None or self.transcript:
            return None
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        last = self.without_trailing_space(self._read(self._render([USER, ASSISTANT])))[-1]
        is_eos, is_unknown = last == self.tokenizer.eos_token_id, last == self.tokenizer.unk_token_id
        return last if is_eos or (last in special and not is_unknown) else None

    @cached_property
    def control(self) -> set[str]:
        """The tokens that nothing said may give: those marked special, and of the other added ones (words of the
        language, "<think>") those with which the template ends or begins a turn."""
        added = self.tokenizer.added_tokens_decoder
        control = {t.content for t in added.values() if t.special} | {*self.tokenizer.all_special_tokens}
        others = {i: t.content for i, t in added.items() if t.content.strip() and t.content not in control}
        if others and self.source is not None and not self.transcript:
            user, prompt = self._render([USER]), self._render([USER], add_generation_prompt=True)
            header = prompt[len(user) :].lstrip() if prompt.startswith(user) else ""
            marks = {*self._read(user), *self._read(header)[:1], self.end_of_turn}
            control |= {token for i, token in others.items() if i in marks}
        return control

    @cached_property
    def opening(self) -> str:
        """What it writes between the generation prompt and what the assistant says, as it is decoded."""
        prompt, whole = self.prompt([USER]), self.conversation([USER, ASSISTANT])
        between = whole[len(prompt) :].partition(ASSISTANT["content"])[0] if whole.startswith(prompt) else ""
        return self.lost_space(prompt) + between

    def lost_space(self, text: str) -> str:
        """The space that decoding puts after this text though the text ends with its own: " " if the text's tokens do
        not show it (those of word-level tokenizers do not), else nothing."""
        space = text[len(text.rstrip()) :]
        return " " if space and not self.tokenizer.decode(self._read(text[-64:])).endswith(space) else ""

    @cached_property
    def closing(self) -> str:
        """What it writes after what the assistant says."""
        return self.conversation([USER, ASSISTANT]).rpartition(ASSISTANT["content"])[2]

    def without_trailing_space(self, tokens: list[int]) -> list[int]:
        end = len(tokens)
        while end and not self.tokenizer.decode(tokens[end - 1 : end]).strip():
            end -= 1
        return tokens[:end]

    def _read(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _source(self, given: str | None) -> str | None:
        own = self.tokenizer.chat_template
        named = own if isinstance(own, dict) else {}
        if given is None and named:
            if "default" not in named:
                raise ValueError(
                    f"{self.owner}: the tokenizer has several chat templates and none is called 'default'; set "
                    f"{self.key} to one of {', '.join(sorted(named))}"
                )
            return named["default"]
        if given is None:
            return own or None
        if given in named:
            return named[given]
        if given == HH or "{" in given:
            return given
        if not (path := Path(given).expanduser()).is_file():
            names = "".join(f"{name}, " for name in sorted(named))
            raise ValueError(
                f"{self.key}={given}: no such file; give {names}a file, a Jinja template or {HH!r}"
            )
        return path.read_text(encoding="utf-8")

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Refuses roles that the template does not know, which some leave out without a word."""
        if self.source is None:
            raise ValueError(
                f"{self.owner}: the data is conversational, but the tokenizer has no chat template; "
                f"set {self.key}=... to a Jinja template, a file that holds one, or {HH!r} (transcripts)"
            )
        roles = {message["role"] for message in messages}
        if self.transcript and (unknown := roles - set(SPEAKERS)):
            raise ValueError(
                f"{self.owner}: an hh-rlhf transcript has no {min(unknown)!r} turn; drop it from the data or "
                f"set {self.key} to a Jinja template"
            )
        for role in sorted(roles - self._kept) if not self.transcript else ():
            said = [i for i, m in enumerate(messages) if m["role"] == role and m.get("content")]
            if not said:
                continue
            place, marker = said[-1], "7083154926"
            marked = [*messages]
            marked[place] = {**messages[place], "content": messages[place]["content"] + marker}
            if marker not in self._render(marked):
                raise ValueError(
                    f"{self.owner}: the chat template leaves out the message of the role {role!r}; drop it from "
                    f"the data or set {self.key} to a template that renders it"
                )
            self._kept.add(role)
        if (
            not self.transcript
            and any(m.get("tool_calls") for m in messages)
            and "tool_calls" not in self._kept
        ):
            bare = [
                {k: v for k, v in m.items() if k != "tool_calls"} | {"content": m.get("content") or ""}
                for m in messages
            ]
            if self._render(messages) == self._render(bare):
                raise ValueError(
                    f"{self.owner}: the chat template leaves out tool calls; drop them from the data or set {self.key} "
                    "to a template that renders them"
                )
            self._kept.add("tool_calls")

    def _transcript(self, messages: Sequence[Message]) -> str:
        if any(not isinstance(m.get("content"), str) for m in messages):
            raise ValueError(
                f"{self.owner}: an hh-rlhf transcript has no tool calls; drop them from the data or set {self.key} to "
                "a Jinja template"
            )
        return "".join(f"\n\n{SPEAKERS[m['role']]}:{_spaced(m)}" for m in messages)

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.source,
                tokenize=False,
                **options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            # Templates refuse what they do not know: roles, their order, a message to continue.
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{self.owner}: the chat template failed ({reason}); set {self.key} or fix the data"
            ) from error


def _spaced(message: Message) -> str:
    """What a turn of a transcript says, after a space. A response may begin with one of its own: sampled ones do."""
    content = message["content"]
    own = message["role"] == "assistant" and (not content or content[0].isspace())
    return content if own else f" {content}"

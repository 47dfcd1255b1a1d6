"""Prompts and responses as texts for a server, by Jinja templates in a sandbox. Imports no torch.

A server reads text: what a response spells like a control token of its model ("<|im_end|>") is read as that token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.data.template import HH, Template
from rlhf.types import Content, Message, Response


class Texts:
    """How a server that reads text is given what was asked and answered.

    Plain text is as it is. Messages are rendered by a chat template, as `rlhf.data.template.Template` says; the
    tokens that a template calls bos_token and eos_token are nothing here, for servers add their own.
    """

    def __init__(self, owner: str, key: str, template: str | None) -> None:
        self._template = None if template is None else Template(_Renderer(), owner, given_text(key, template))
        ways = f"a Jinja template, a file that holds one, or {HH!r}"
        self._missing = f"{owner}: the prompts are messages; set {key} to {ways}"
        if self._template is not None:
            self._template.key = key

    def prompt(self, content: Content) -> str:
        """What stands before the response."""
        return content if isinstance(content, str) else self._chat.prompt(content)

    def asked(self, content: Content) -> str:
        """The prompt by itself."""
        return content if isinstance(content, str) else self._chat.conversation(content)

    def whole(self, content: Content, response: Response) -> str:
        """Prompt and response."""
        if isinstance(content, str):
            assert isinstance(response, str), "the response to plain text is plain text"
            return content + response
        return self._chat.conversation(conversation(content, response))

    @property
    def _chat(self) -> Template:
        if self._template is None:
            raise ValueError(self._missing)
        return self._template


def conversation(content: Content, response: Response) -> list[Message]:
    """All turns; one that the prompt begins and the response ends is one.

    >>> conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}], "llo")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    messages: list[Message] = (
        [{"role": "user", "content": content}] if isinstance(content, str) else [*content]
    )
    turns: list[Message] = (
        [{"role": "assistant", "content": response}] if isinstance(response, str) else [*response]
    )
    if messages[-1]["role"] == turns[0]["role"] == "assistant":
        begun = messages.pop()["content"]
        turns[0] = {**turns[0], "content": begun + (turns[0].get("content") or "")}
    return [*messages, *turns]


def spoken(messages: Sequence[Message]) -> str:
    """What messages say, for people: of several with who says it.

    >>> spoken([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'user: Hi\\n\\nassistant: Hello'
    """
    if len(messages) == 1:
        return _said(messages[0])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def given_text(key: str, given: str) -> str:
    """A Jinja text, or what the file holds that is named instead ("hh" is neither).

    Raises:
        ValueError: there is no such file.
    """
    if given == HH or "{" in given:
        return given
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{key}={given}: {reason}; give a file or a Jinja text") from None
    if "{" not in text:
        raise ValueError(f"{key}={given}: what it holds is no Jinja text: there is no {{ in it")
    return text


def environment(strict: bool = False) -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it; strict: a name that is not there is an error."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        undefined=StrictUndefined if strict else Undefined,
    )
    made.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


class _Renderer:
    """What `Template` asks of a tokenizer."""

    chat_template = None

    def __init__(self) -> None:
        self._compiled = cache(environment().from_string)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        assert not tokenize
        try:
            template = self._compiled(chat_template)
            text = template.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return _until(text, messages[-1]["content"]) if continue_final_message else text


def _until(text: str, said: str) -> str:
    """The text up to where it says this, with the space that follows if it is said too."""
    begin = text.rfind(said.strip())
    if begin < 0:
        raise TemplateError("it leaves out the message that the response continues")
    kept = said.lstrip() if text.startswith(said.lstrip(), begin) else said.strip()
    return text[: begin + len(kept)]


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (f" {json.dumps(calls, ensure_ascii=False)}" if calls else "")


def _refuse(message: str) -> None:
    raise TemplateError(message)

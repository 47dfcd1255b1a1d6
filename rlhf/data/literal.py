"""Text to tokens, where a control token that a user or a response spells is text.

What a tokenizer calls an added token is found wherever its spelling occurs, in a user's message too. Here each
spelling is either the token (a template wrote it, or a plain-text prompt that was rendered before) or text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class TextReader:
    """Reads text under one tokenizer.

    `marked(content)` replaces every control token that the content spells by a placeholder, which a template
    passes on like any other word; `tokens(text)` reads the text with placeholders turned back, as text, and all
    other spellings of added tokens as those tokens. Text without placeholders is read by the tokenizer itself.

    With placeholders a copy of the tokenizer reads, exact but for one thing: control tokens have other names in
    it, which no text holds, and the text's own tokens are given those names first. Tokenizers in Python have no
    such copy: their text is read between its control tokens, and a piece with a placeholder without any added
    tokens.

    `control` are the spellings that are never read from a content; `owner` is named in errors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Collection[str], owner: str) -> None:
        self.tokenizer, self.owner = tokenizer, owner
        self._nonce = str(secrets.randbits(64))  # so that no text holds a placeholder or a name by chance
        self._control = [*control, ""]  # a placeholder for nothing keeps its neighbours apart
        self._names = {token: f"<{self._nonce}:{i}>" for i, token in enumerate(control)}
        self._ids: dict[str, int] = dict(
            zip(control, tokenizer.convert_tokens_to_ids(list(control)), strict=True)
        )
        self._spelled = _any_of(control)
        self._placeholder = re.compile(f"\ue000{self._nonce}\ue001([0-9]+)\ue002")
        self._longest = max(map(len, self._control))

    def marked(self, value: Any) -> Any:
        """A content (text, or what messages are made of) with placeholders for the control tokens it spells."""
        if isinstance(value, str):
            return self._spelled.sub(lambda found: self._mark(found[0]), value)
        if isinstance(value, Mapping):
            return {name: self.marked(part) for name, part in value.items()}
        return [self.marked(part) for part in value] if isinstance(value, list | tuple) else value

    def joined(self, text: str, content: str) -> str:
        """Text and a content after it, which makes no control token together with the text's end."""
        border = min(len(text), self._longest)
        together = text[len(text) - border :] + content
        spans = (found.span() for found in self._spelled.finditer(together))
        split = any(start < border < end for start, end in spans)
        return text + self._mark("") * split + self.marked(content)

    def plain(self, text: str) -> str:
        """The text with its placeholders turned back."""
        if self._nonce not in text:
            return text
        text = self._placeholder.sub(lambda found: self._control[int(found[1])], text)
        if "\ue000" + self._nonce in text:
            raise ValueError(
                f"{self.owner}: the chat template cuts a message that spells a control token of the tokenizer; "
                f"drop the token from the data or use a template that leaves contents whole"
            )
        return text

    def tokens(self, text: str) -> list[int]:
        """The tokens of the text alone, without those that the tokenizer puts around it."""
        if self._nonce not in text and not self._normalised:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._fast_tokens(text) if self.tokenizer.is_fast else self._slow_tokens(text)

    def _mark(self, spelling: str) -> str:
        return f"\ue000{self._nonce}\ue001{self._control.index(spelling)}\ue002"

    def _fast_tokens(self, text: str) -> list[int]:
        meant: list[str] = []

        def named(found: re.Match[str]) -> str:
            if found[0] in self._names:
                meant.append(found[0])
            return self._names.get(found[0], found[0])

        tokens = self._copy.encode(self.plain(self._added.sub(named, text)), add_special_tokens=False).ids
        self._check(tokens, meant, text)
        return tokens

    def _slow_tokens(self, text: str) -> list[int]:
        tokens: list[int] = []
        pieces = self._spelled.split(text)
        meant = self._spelled.findall(text)
        for piece, token in zip(pieces, [*meant, None], strict=True):
            literal = self._nonce in piece
            tokens += self.tokenizer(
                self.plain(piece), add_special_tokens=False, split_special_tokens=literal
            )["input_ids"]
            tokens += [] if token is None else [self._ids[token]]
        self._check(tokens, meant, text)
        return tokens

    def _check(self, tokens: list[int], meant: list[str], text: str) -> None:
        """Refuses text from whose ordinary pieces the tokenizer makes a control token, and control tokens that it
        does not find (those of whole words only, beside another word)."""
        unknown = self.tokenizer.unk_token_id
        names = {i: token for token, i in self._ids.items() if i != unknown}
        found = Counter(names[i] for i in tokens if i in names)
        expected = Counter(token for token in meant if self._ids[token] != unknown)
        if unmeant := found - expected:
            raise ValueError(
                f"{self.owner}: the tokenizer reads {min(unmeant)!r} as that token even where it is text, in "
                f"{self.plain(text)[-200:]!r}; leave it out of the data or drop it from the vocabulary"
            )
        if missed := expected - found:
            raise ValueError(
                f"{self.owner}: the tokenizer does not find its token {min(missed)!r} everywhere, in "
                f"{self.plain(text)[-200:]!r}; add it as a special token that is no single word"
            )

    @cached_property
    def _added(self) -> re.Pattern[str]:
        return _any_of(self.tokenizer.get_added_vocab().keys() | self._names.keys())

    @cached_property
    def _normalised(self) -> bool:
        """Whether other spellings, in capital letters for example, are read as a control token too."""
        if not self.tokenizer.is_fast or self.tokenizer.backend_tokenizer.normalizer is None:
            return False
        added = self.tokenizer.added_tokens_decoder.values()
        return any(token.normalized for token in added if token.content in self._names)

    @cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens, among the added ones and in its vocabulary."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        ids = {}
        for token in state["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
            ids[token["content"]] = token["id"]
        _rename(state["model"], self._names, ids)
        copy = Tokenizer.from_str(json.dumps(state))
        copy.no_truncation()
        copy.no_padding()
        assert ids == {name: copy.token_to_id(name) for name in ids}
        return copy


def _rename(model: dict[str, Any], names: Mapping[str, str], ids: Mapping[str, int]) -> None:
    """Gives tokens of the model's vocabulary new names. Those that merges are made of keep the old one besides:
    they are ordinary pieces of words."""
    if isinstance(model["vocab"], list):  # Unigram: pieces with their scores, an id each in order
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    parts: set[str] = set()
    inner = model.get("continuing_subword_prefix") or ""
    for first, second in model.get("merges", ()):
        parts |= {first, second, first + second.removeprefix(inner)}
    for old, new in names.items():
        if old in model["vocab"] and old not in parts:
            del model["vocab"][old]
        if model.get("unk_token") == old and old not in parts:
            model["unk_token"] = new
    model["vocab"] |= ids  # an added token outside of the vocabulary would get the next free id


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest of several (none: nothing)."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

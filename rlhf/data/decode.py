"""Tokens back to text, as they read after other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 16
"""So many tokens before are decoded along: the text after them depends on the last one or on a character's bytes."""


def text_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What `tokens` add to the text of the tokens before them: the text of all, less that of `before`.

    Alone, tokens lose what depends on their neighbours: SentencePiece's space at the start, WordPiece's joint
    ("##"), the end of words. Special tokens are in the text as they are spelled.
    """
    context = before[-CONTEXT:]
    start, whole = _decode(tokenizer, context), _decode(tokenizer, [*context, *tokens])
    if not whole.startswith(start):
        # Byte fallback decodes a run of single bytes as one, and none of it if its last character is cut off.
        # The text before is whole characters, so a letter does for it.
        context = tokenizer("a", add_special_tokens=False)["input_ids"]
        start, whole = _decode(tokenizer, context), _decode(tokenizer, [*context, *tokens])
    return whole.removeprefix(start)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

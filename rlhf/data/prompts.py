"""Prompts of a user's dataset, and what all kinds of rows share: which columns hold a prompt, and what it may be.

A row holds its prompt in one of these ways; the first that is there counts:

    {"prompt": "text"}                                    standard
    {"prompt": [{"role": "user", "content": "text"}]}     conversational; a last message of the assistant is
                                                          the beginning of the response
    {"messages": [..., {"role": "user", ...}]}            a last turn of the assistant is dropped
    {"chosen": ..., "rejected": ...}                      implicit: what both begin with

Messages are in any form of `rlhf/data/messages.py`. A text prompt beside conversational responses (messages in
"chosen", "rejected", "completion" or "messages") is the user's message.
"""

from __future__ import annotations

import logging

from rlhf.data.messages import as_content, as_messages, is_messages, is_transcript
from rlhf.data.rows import Row, Source, named, read_rows
from rlhf.types import Content, Message, Prompt, prompt_id

logger = logging.getLogger(__name__)

ASKING = ("user", "tool")  # what the assistant answers
UNREAD = {  # columns that other trainers give to the model: whether they are lost for text prompts too
    "image": True,
    "images": True,
    "tools": False,
    "chat_template_kwargs": False,
}
FOREIGN = {  # columns that tell a known format
    "conversations": "turn 'conversations' (ShareGPT: 'from', 'value') into 'messages' with 'role' and 'content'",
    "instruction": "turn 'instruction' and 'input' (Alpaca) into 'prompt', and 'output' into 'completion'",
}


def load_prompts(source: Source) -> list[Prompt]:
    """The distinct prompts of `source`, in order. A repeated prompt is kept once (its first row), and a
    warning counts the repetitions. `meta` has the columns of the row that did not make the prompt."""
    rows = read_rows(source)
    prompts: dict[int, Prompt] = {}
    for row in rows:
        content, used = _prompt(row)
        meta = {name: value for name, value in row.values.items() if name not in used}
        prompts.setdefault(prompt_id(content), Prompt(content, meta, row.source))
    if dropped := len(rows) - len(prompts):
        logger.warning(
            "%s: dropped %d of %d rows: duplicate prompts (the first of each is kept); %d prompts remain",
            named(source),
            dropped,
            len(rows),
            len(prompts),
        )
    return list(prompts.values())


def _prompt(row: Row) -> tuple[Content, tuple[str, ...]]:
    """The row's prompt, and the columns it was made from."""
    if has(row, "prompt"):
        return explicit_prompt(row, drop_answer=True), ("prompt",)
    if has(row, "messages"):
        messages = as_messages(row.values["messages"], f"{row.source}: 'messages'")
        return checked(without_answer(messages), row), ("messages",)
    if has(row, "chosen", "rejected"):
        return implicit_prompt(row), ("chosen", "rejected")
    raise missing(row, "no prompt", "'prompt', 'messages', or both 'chosen' and 'rejected'")


def has(row: Row, *names: str) -> bool:
    """Whether all these columns have a value (Parquet fills the absent ones with None)."""
    return all(row.values.get(name) is not None for name in names)


def missing(row: Row, what: str, expected: str) -> ValueError:
    found = ", ".join(repr(name) for name in row.values if has(row, name)) or "none"
    hints = [hint for name, hint in FOREIGN.items() if has(row, name)] or ["rename or convert the columns"]
    return ValueError(f"{row.source}: {what}: expected {expected}; found the keys {found}; {hints[0]}")


def explicit_prompt(row: Row, drop_answer: bool = False) -> Content:
    """The prompt in the column "prompt". Of a transcript the assistant's last turn is dropped if it is empty
    ("\\n\\nAssistant:"), with `drop_answer` also if it says something."""
    value = row.values["prompt"]
    content = as_content(value, f"{row.source}: 'prompt'")
    if isinstance(content, str):
        others = (row.values.get(name) for name in ("chosen", "rejected", "completion", "messages"))
        if any(map(is_messages, others)):
            content = [{"role": "user", "content": content}]
    elif is_transcript(value) and (drop_answer or not content[-1]["content"]):
        content = without_answer(content)
    return checked(content, row, begun=not is_transcript(value))


def implicit_prompt(row: Row) -> Content:
    """What chosen and rejected both begin with: text up to the end of a word, or whole messages up to one that
    the assistant answers in both. What is left to each of the two is its response.

    In text the space before a response belongs to it, and a word or number that only begins the same is not
    split (TRL's `extract_prompt` splits it).
    """
    chosen = as_content(row.values["chosen"], f"{row.source}: 'chosen'")
    rejected = as_content(row.values["rejected"], f"{row.source}: 'rejected'")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (common := _common_text(chosen, rejected)).strip():
            raise ValueError(
                f"{row.source}: the beginning that both share is empty; if another column holds the prompt, name it "
                "'prompt', else leave the row out"
            )
        return checked(common, row)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(f"{row.source}: 'chosen' and 'rejected' must both be text or both be messages")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not (chosen[shared - 1]["role"] in ASKING and _answers(chosen, rejected, shared)):
        shared -= 1
    if not shared:
        raise ValueError(
            f"{row.source}: no prompt: 'chosen' and 'rejected' share no turn of the user that both answer"
        )
    return checked(chosen[:shared], row)


def _answers(chosen: list[Message], rejected: list[Message], at: int) -> bool:
    """Whether the assistant speaks next in both, if anyone does."""
    return all(messages[at]["role"] == "assistant" for messages in (chosen, rejected) if at < len(messages))


def _common_text(first: str, second: str) -> str:
    end, limit = 0, min(len(first), len(second)) - 1
    while end < limit and first[end] == second[end]:
        end += 1
    while end and _in_word(first[end - 1]) and (_in_word(first[end]) or _in_word(second[end])):
        end -= 1
    return first[: end - 1] if end and first[end - 1] == " " else first[:end]


def _in_word(character: str) -> bool:
    """Of a number, or of a word in a script that puts spaces between words (those have letter case)."""
    return character.isdigit() or character.lower() != character.upper()


def without_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def checked(content: str | list[Message], row: Row, begun: bool = False) -> Content:
    """The content, if it can be answered and is all that there is to read.

    It is not empty, and the last of its messages is the user's or a tool's, with `begun` also the assistant's
    own, which the response continues. A column that goes to the model elsewhere, and is not read here, is
    refused.
    """
    if not isinstance(content, str) and content:
        last = content[-1]
        role = last["role"]
        if role not in (*ASKING, "assistant") or (role == "assistant" and not begun):
            raise ValueError(
                f"{row.source}: the last message of a prompt must be the user's, not the {role}'s"
            )
        if "tool_calls" in last:
            raise ValueError(
                f"{row.source}: the prompt ends with tool calls; give the tools' answers after them"
            )
    if _empty(content):
        raise ValueError(f"{row.source}: the prompt is empty; give it text or leave the row out")
    for name, always in UNREAD.items():
        if (always or not isinstance(content, str)) and row.values.get(name) not in (None, "", [], {}):
            raise ValueError(
                f"{row.source}: the column {name!r} is not given to the models; leave the column out, "
                "after writing what matters of it into the messages"
            )
    return content


def _empty(content: str | list[Message]) -> bool:
    """Whether nothing is said. A tool may answer with nothing."""
    if isinstance(content, str):
        return not content.strip()
    return not content or (content[-1]["role"] != "tool" and not content[-1]["content"].strip())

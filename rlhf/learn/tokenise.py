"""Data sets as the learner's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlhf.config import Config
from rlhf.data.chat import ChatFormat
from rlhf.data.demonstrations import load_demonstrations
from rlhf.data.messages import said
from rlhf.data.microcosm import build_tokenizer
from rlhf.data.preferences import Preference, load_preferences, made_of_preferences
from rlhf.data.prepare import RunData
from rlhf.data.rows import Source, at
from rlhf.learn.objectives import PreferencePairs, TokenPairs
from rlhf.models.load import load_config, load_tokenizer
from rlhf.models.reach import Reach, max_positions
from rlhf.sources.source import rewards_of
from rlhf.store import Store, fingerprint, source_fingerprint
from rlhf.types import Content, Ragged, Response, prompt_id


def demonstration_tokens(config: Config, tokenizer: str, source: Source) -> TokenPairs:
    """Prompt and response tokens of a data set of demonstrations, under the policy's tokenizer and template.

    Raises:
        ValueError: a row is malformed, longer than the model takes, or refused by its template; it names the row.
    """
    policy = config.policy
    limit = max_positions(load_config(policy.init_from, "policy.init_from")) if policy.init_from else None
    chat = ChatFormat(load_tokenizer(tokenizer, "policy.init_from"), "policy", policy.chat_template)
    prompts, responses = [], []
    for example in load_demonstrations(source):
        with at(example.source):
            prompts.append(chat.prompt_tokens(example.prompt))
            responses.append(chat.response_tokens(example.prompt, example.response))
            _check(len(prompts[-1]) + len(responses[-1]), limit or policy.architecture.max_positions)
    return TokenPairs(Ragged.of(prompts, np.int32), Ragged.of(responses, np.int32))


def preference_tokens(
    key: str, template: str | None, start: str, source: Source, tolerated_share: float
) -> tuple[PreferencePairs, np.ndarray]:
    """Conversation tokens of a preference data set, for a reward model that starts from the model `start`, and the
    ids of the pairs' prompts, uint64 [N].

    Args:
        key: of the reward model in the configuration.

    Raises:
        ValueError: more than the tolerated share of the rows is malformed, longer than the model takes, refused by
            its template, or of the same tokens for both responses; it names a row.
    """
    reach = Reach.of(load_config(start, f"{key}.init_from"))
    name = key.rsplit(".", 1)[1]
    chat = ChatFormat(load_tokenizer(start, f"{key}.init_from"), f"reward model '{name}'", template)

    def tokens(pair: Preference) -> tuple[np.ndarray, np.ndarray, int]:
        with at(pair.source):
            chosen, rejected = (
                chat.conversation_tokens(pair.prompt, r) for r in (pair.chosen, pair.rejected)
            )
            _check(max(len(chosen), len(rejected)), reach.limit)
            if len(set(reach.switched(np.array([len(chosen), len(rejected)])))) > 1:
                raise ValueError(
                    f"of the two conversations one is longer than {reach.switch} tokens, where the model's rotary "
                    "frequencies change; leave the row out"
                )
            if chosen == rejected:
                raise ValueError(
                    "'chosen' and 'rejected' are the same to the model's tokenizer; leave the row out"
                )
        return np.array(chosen, np.int32), np.array(rejected, np.int32), prompt_id(pair.prompt)

    chosen, rejected, ids = zip(*made_of_preferences(source, tolerated_share, tokens), strict=True)
    return PreferencePairs(Ragged.of(chosen, np.int32), Ragged.of(rejected, np.int32)), np.array(
        ids, np.uint64
    )


def held_out_pairs(key: str, prompt_ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which pairs are held out, bool [N]: about this share of them, all pairs of a prompt or none.

    Args:
        prompt_ids: uint64 [N], of the pairs.

    Raises:
        ValueError: all pairs are of one prompt; it names the key.
    """
    if share == 0:
        return np.zeros(len(prompt_ids), bool)
    prompts, pairs = np.unique(prompt_ids, return_counts=True)
    if len(prompts) < 2:
        raise ValueError(
            f"{key}.held_out={share:g}: all pairs are of one prompt, so none can be held out; set it to 0"
        )
    order = np.random.default_rng([seed, 0x4E1D]).permutation(len(prompts))
    most = np.searchsorted(np.cumsum(pairs[order]), share * len(prompt_ids)) + 1
    return np.isin(prompt_ids, prompts[order[: min(int(most), len(prompts) - 1)]])


def _check(tokens: int, limit: int | None) -> None:
    if limit is not None and tokens > limit:
        raise ValueError(f"{tokens} tokens, but the model takes {limit}; shorten the row or leave it out")


def tokenizer_folder(config: Config, data: RunData, store: Store) -> Path:
    """The microcosm's own tokenizer, made of all its texts."""
    sources = [data.demonstrations, *data.preferences.values()]
    name = fingerprint([source_fingerprint(s) for s in sources if s], data.prompts_fingerprint())
    if store.has("tokenizer", name):
        return store.folder("tokenizer", name)
    return store.make(
        "tokenizer", name, lambda folder: build_tokenizer(_texts(config, data)).save_pretrained(folder)
    )


def _texts(config: Config, data: RunData) -> Iterator[str]:
    for prompt in [*data.prompts, *data.eval_prompts]:
        yield from _said(prompt.content)
    if data.demonstrations is not None:
        for example in load_demonstrations(data.demonstrations):
            yield from (*_said(example.prompt), example.response)
    for source in data.preferences.values():
        for pair in load_preferences(source, config.data.tolerated_share) if source else []:
            yield from (*_said(pair.prompt), *_said(pair.chosen), *_said(pair.rejected))
    for own in rewards_of(config.reward_models).values():
        yield from own.canned


def _said(content: Content | Response) -> list[str]:
    return [content] if isinstance(content, str) else [said(message) for message in content]

"""Loading and making policies, reward models and tokenizers: any Hugging Face name or folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import ArchitectureConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def _naming(key: str, path: str) -> Iterator[None]:
    """Turns a loading failure into one error that names the configuration key and the path."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{key}={path} cannot be loaded: {reason}") from error


def check_path(key: str, path: str, holds: str = "config.json") -> None:
    """Refuses a path that looks local and is not there (a hub name has at most one slash and no dot first).

    Raises:
        ValueError: names the key and the path.
    """
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/")
    folder = Path(path).expanduser()
    if looks_local and not folder.is_dir():
        raise ValueError(f"{key}={path}: no such folder")
    if folder.is_dir() and not (folder / holds).is_file():
        raise ValueError(f"{key}={path}: the folder holds no {holds}; was it saved by save_pretrained?")


def load_config(path: str, key: str) -> Any:
    from transformers import AutoConfig

    check_path(key, path)
    with _naming(key, path):
        return AutoConfig.from_pretrained(path)


def load_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    check_path(key, path, "tokenizer_config.json")
    with _naming(key, path):
        return AutoTokenizer.from_pretrained(path)


def load_policy(path: str, key: str = "policy.path", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode, float32 unless told."""
    import torch
    from transformers import AutoModelForCausalLM

    check_path(key, path)
    with _naming(key, path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32).eval()


def new_policy(
    architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A Llama-style model with random weights, made for `tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=architecture.max_positions,
        hidden_act=architecture.activation,
        initializer_range=architecture.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def check_reward_config(config: Any, key: str) -> None:
    """Refuses what is no Bradley-Terry reward model.

    Raises:
        ValueError: names the key and the number of labels.
    """
    if config.num_labels != 1:
        raise ValueError(
            f"{key}: a reward model has one label, this sequence classifier has {config.num_labels}; "
            "save it with num_labels=1"
        )


def load_reward_model(path: str, key: str) -> PreTrainedModel:
    """A sequence classifier with one label, in evaluation mode, float32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    check_reward_config(load_config(path, key), key)
    with _naming(key, path):
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()


def new_reward_model(path: str, key: str, seed: int, pad_token_id: int | None) -> PreTrainedModel:
    """A reward model with the weights of the causal model at `path` under a new head that scores 0."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    torch.manual_seed(seed)
    check_path(key, path)
    logging.set_verbosity_error()  # the missing head is meant
    with _naming(key, path):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    torch.nn.init.zeros_(model.score.weight)
    return model


def max_positions(config: Any) -> int | None:
    """The longest sequence a model takes, if its configuration says."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Token ids that end a response by the model's generation configuration."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}

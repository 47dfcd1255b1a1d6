"""Loading and making policies, reward models and tokenizers: any Hugging Face name or folder, or an adapter on one.

A model is loaded whole or not at all: weights that are missing, of another shape or NaN are an error.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf.config import ArchitectureConfig
from rlhf.models.families import fault_of_policy
from rlhf.models.reach import max_positions
from rlhf.models.source import check_allowed, find_source, find_tokenizer, naming, trusted

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def load_config(path: str, key: str) -> Any:
    """A model's configuration; of an adapter, its base's."""
    from transformers import AutoConfig

    source = find_source(path, key)
    with naming(key, source.named(path)):
        return AutoConfig.from_pretrained(source.model, trust_remote_code=trusted())


def policy_config(path: str, key: str = "policy.path") -> Any:
    """The configuration of a causal language model.

    Raises:
        ValueError: it is none; names the key, the path and what it is.
    """
    config = load_config(path, key)
    _check_kind(config, path, key, CAUSAL)
    fault = fault_of_policy(config)
    if fault is not None:
        raise ValueError(
            f"{key}={path} is a model of the type '{config.model_type}', which cannot be a policy: {fault}"
        )
    for name in _made_for(config, path, key):
        if name == "SEQ_CLS" or name in _names(CLASSIFIER):
            raise ValueError(
                f"{key}={path} is for sequence classification ({name}), and no causal language model"
            )
    return config


def reward_config(path: str, key: str, single: bool = True) -> Any:
    """The configuration of a reward model; of one label, if `single`.

    Raises:
        ValueError: it is none; names the key, the path and what it is.
    """
    config = start_config(path, key)
    for name in _made_for(config, path, key):
        if name == "CAUSAL_LM" or name in _names(CAUSAL):
            raise ValueError(
                f"{key}={path} is a causal language model ({name}), which has no head that makes rewards; give a "
                "sequence classifier, or train one from it with init_from and preferences"
            )
        if name.endswith("Model") and name not in _names(CLASSIFIER):
            raise ValueError(
                f"{key}={path} is a {name}, which has no head that makes rewards; give a sequence classifier, or train "
                "one from it with init_from and preferences"
            )
    if single and find_source(path, key).adapter is None and config.num_labels != 1:  # else the adapter's
        raise ValueError(
            f"{key}={path}: a reward model has one label, this sequence classifier has {config.num_labels}; name "
            "those that are rewards (heads: {NAME: LABEL}), or save it with num_labels=1"
        )
    return config


def labels_of(config: Any, key: str, path: str, heads: Mapping[str, Any] | None) -> list[int]:
    """The labels of a classifier that its rewards are, in the order of `heads` (reward -> number or name of a label, or
    a mapping with it under "label"); without heads its only one.

    Raises:
        ValueError: there is no such label; it names the key and what there is.
    """
    if not heads:
        return [0]
    names = {str(name): int(i) for i, name in (config.id2label or {}).items()}
    found = []
    for head, given in heads.items():
        label = given["label"] if isinstance(given, Mapping) else given
        index = label if isinstance(label, int) else names.get(label)
        if index is None or not 0 <= index < config.num_labels:
            known = _listed([f"{i} ({name})" for name, i in names.items()], most=8)
            raise ValueError(f"{key}.{head}={label} is no label of {path}, which has {known}")
        found.append(index)
    return found


def start_config(path: str, key: str) -> Any:
    """The configuration of a model that a reward model or a critic can start from.

    Raises:
        ValueError: it cannot; names the key, the path and what it is.
    """
    config = load_config(path, key)
    _check_kind(config, path, key, CLASSIFIER)
    return config


def _check_kind(config: Any, path: str, key: str, auto: str) -> None:
    """Refuses a model that transformers has not in this kind, if none comes with it that may run."""
    if config.model_type in _names(auto, types=True):
        return
    if auto in (getattr(config, "auto_map", None) or {}):
        check_allowed(path, key)
    else:
        kind = "causal language model" if auto == CAUSAL else "sequence classifier"
        raise ValueError(f"{key}={path}: transformers has no {kind} of the type '{config.model_type}'")


def _made_for(config: Any, path: str, key: str) -> list[str]:
    """The class that a model was saved as, by its configuration; of an adapter its task."""
    source = find_source(path, key)
    if source.adapter is not None:
        return [source.task] if source.task else []
    return getattr(config, "architectures", None) or []


def _names(auto: str, types: bool = False) -> Collection[str]:
    """The classes that transformers has of a kind, or their types of model."""
    from transformers.models.auto import modeling_auto as known

    names = {
        CAUSAL: known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        CLASSIFIER: known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }[auto]
    return names.keys() if types else names.values()


def load_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; of an adapter without one, its base's."""
    from transformers import AutoTokenizer

    found = find_tokenizer(path, key)
    with naming(key, path):
        return AutoTokenizer.from_pretrained(found, trust_remote_code=trusted())


def load_policy(path: str, key: str = "policy.path", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode, float32 unless told."""
    policy_config(path, key)
    return _load(CAUSAL, path, key, dtype)


def policy_outline(path: str, key: str = "policy.path") -> PreTrainedModel:
    """A causal language model without weights, on the meta device: its parameters' names and shapes, its
    configuration and its generation configuration.

    Raises:
        ValueError: it is no policy, or an adapter, which has no weights of its own for all of them.
    """
    import torch
    import transformers

    config, source = policy_config(path, key), find_source(path, key)
    if source.adapter is not None:
        raise ValueError(f"{key}={path} is an adapter on {source.model}: merge it into its model first")
    with naming(key, path), torch.device("meta"):
        model = getattr(transformers, CAUSAL).from_config(config, trust_remote_code=trusted())
    with contextlib.suppress(OSError):  # there is none: then it is what the configuration says
        model.generation_config = transformers.GenerationConfig.from_pretrained(source.model)
    return model


def load_reward_model(path: str, key: str, single: bool = True) -> PreTrainedModel:
    """A sequence classifier, of one label if `single`, in evaluation mode, float32."""
    reward_config(path, key, single)
    return _load(CLASSIFIER, path, key, num_labels=1) if single else _load(CLASSIFIER, path, key)


def new_reward_model(path: str, key: str, seed: int, pad_token_id: int | None) -> PreTrainedModel:
    """A reward model with the weights of the model at `path` under a new head that scores 0. Where its configuration
    names no padding token, it becomes `pad_token_id`."""
    import torch

    torch.manual_seed(seed)
    start_config(path, key)
    model = _load(CLASSIFIER, path, key, new_head=True, num_labels=1)
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = model.config.pad_token_id = pad_token_id
    head = head_of(model)
    if head is None:
        raise ValueError(
            f"{key}={path}: {type(model).__name__} has no single linear layer that makes the reward"
        )
    torch.nn.init.zeros_(head.weight)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)
    return model


def head_of(model: PreTrainedModel) -> torch.nn.Linear | None:
    """What makes a classifier's scores: the only linear layer outside of its body with an output for each label."""
    import torch

    body = set() if model.base_model is model else set(model.base_model.modules())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in body]
    found = [m for m in linear if m.out_features == model.config.num_labels]
    return found[0] if len(found) == 1 else None


def _outside_of_body(model: PreTrainedModel) -> set[str]:
    """The weights of a classifier that its body does not have; where the two are not told apart, those of its head."""
    if model.base_model is model:
        own = {id(weight) for weight in head.parameters()} if (head := head_of(model)) else set()
    else:
        own = {id(w) for w in model.parameters()} - {id(w) for w in model.base_model.parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in own}


def _load(
    auto: str, path: str, key: str, dtype: torch.dtype | None = None, new_head: bool = False, **changes: Any
) -> PreTrainedModel:
    """A model whose every weight is from what `path` holds; with `new_head`, but for those outside of its body."""
    import torch
    import transformers

    source = find_source(path, key)
    with naming(key, source.named(path)), _quiet():
        model, found = getattr(transformers, auto).from_pretrained(
            source.model,
            dtype=dtype or torch.float32,
            trust_remote_code=trusted(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **changes,
        )
    missing = dict.fromkeys(found["missing_keys"], "is not there")
    missing |= {
        name: f"has the shape {list(have)}, not {list(want)}" for name, have, want in found["mismatched_keys"]
    }
    if source.adapter is not None:
        from rlhf.models.lora import merged

        with naming(key, source.named(path)):
            model, brought = merged(model, source.adapter)
        missing = {name: fault for name, fault in missing.items() if name not in brought}
    if new_head:
        meant = _outside_of_body(model)
        missing = {name: fault for name, fault in missing.items() if name not in meant}
    _check_whole(f"{key}={path}", missing, sorted(found["unexpected_keys"]))
    _check_numbers(f"{key}={path}", model)
    return model.eval()


def _check_whole(what: str, missing: dict[str, str], unread: list[str]) -> None:
    """Weights that are missing would be random. Those that the model has no place for change nothing that it computes,
    here as in plain transformers: they are told of."""
    unknown = f"; it has no place for {_listed(unread)}" if unread else ""
    if missing:
        faults = _listed([f"{name} {fault}" for name, fault in sorted(missing.items())])
        raise ValueError(f"{what} cannot be loaded: of the model's weights {faults}{unknown}")
    if unread:
        log.warning("%s: not read, as the model has no place for them: %s", what, _listed(unread))


def _check_numbers(what: str, model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.detach().sum().isnan() and weight.isnan().any():
            raise ValueError(f"{what} cannot be loaded: the weight {name} has NaN")


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own report of missing weights is a table of many lines; ours is an error of one."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(before)


def new_policy(
    architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A Llama-style model with random weights, made for `tokenizer`."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(new_config(architecture, tokenizer)).eval()


def new_config(architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The configuration of `new_policy`."""
    from transformers import LlamaConfig

    return LlamaConfig(
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


def usable_positions(model: PreTrainedModel) -> int | None:
    """`max_positions`, less those that a model counts from its padding token on (RoBERTa and its kin)."""
    import torch

    limit = max_positions(model.config)
    named = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    for module in (m for m in named if isinstance(m, torch.nn.Embedding) and m.num_embeddings == limit):
        if module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Token ids that end a response by the model's generation configuration."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}

"""Low-rank adapters on a policy, by peft: trained alone, merged wherever the whole policy is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.config import LoraConfig

PREFIX = "base_model.model."


def with_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Any:
    """The model under a new adapter, which changes nothing yet; only the adapter's weights are trainable.

    Raises:
        ValueError: the model has no module of these names, or one of them is an embedding or shares its weight with
            another module; it names policy.lora.target_modules.
    """
    import peft

    torch.manual_seed(seed)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "weight")})
        raise ValueError(
            f"policy.lora.target_modules={lora.target_modules}: {error} The model has {', '.join(names)}"
        ) from None
    _check_layers(adapted, lora)
    return adapted


def _check_layers(adapted: Any, lora: LoraConfig) -> None:
    """Adapters must be on layers of weights that are theirs alone: elsewhere they cannot be merged."""
    owners: dict[int, list[str]] = {}
    for name, parameter in adapted.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in adapted.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        base = module.get_base_layer()
        if isinstance(base, torch.nn.Embedding) or len(owners[id(base.weight)]) > 1:
            what = (
                "is an embedding"
                if isinstance(base, torch.nn.Embedding)
                else "shares its weight with another"
            )
            raise ValueError(
                f"policy.lora.target_modules={lora.target_modules}: {name.removeprefix(PREFIX)} {what}, and an adapter "
                "on it cannot be merged into the policy; leave it out"
            )


def merged(model: PreTrainedModel, adapter: str) -> tuple[PreTrainedModel, set[str]]:
    """The model under a saved adapter (a folder or hub name), merged in; and which of the model's own weights came
    with the adapter, whole.

    Raises:
        ValueError: the adapter cannot be merged, or is for another model.
    """
    import peft

    settings = peft.PeftConfig.from_pretrained(adapter)
    if settings.is_prompt_learning:
        raise ValueError(f"an adapter of the kind {settings.peft_type.value} cannot be merged into a model")
    settings.task_type = None  # whose wrapper is of no use here, and asks more of the model
    adapted = peft.get_peft_model(model, settings)
    found = adapted.load_adapter(adapter, "default")
    strange = [*found.missing_keys, *found.unexpected_keys]
    if strange:
        raise ValueError(
            f"the adapter does not fit its base: {len(strange)} weights do not, {strange[0]} among them"
        )
    names = {name.removeprefix(PREFIX) for name in peft.load_peft_weights(adapter, device="cpu")}
    return adapted.merge_and_unload().requires_grad_(True), names  # peft freezes the base


def is_adapted(model: torch.nn.Module) -> bool:
    return hasattr(model, "peft_config")


def adapter_off(model: Any) -> AbstractContextManager:
    """Within this context the model computes as it did before the adapter."""
    return model.disable_adapter()


def merged_parameters(model: Any, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of the plain model that computes the same, by the plain model's names.

    Args:
        full: every parameter of the adapted model, whole, float32 on the CPU.
    """
    found = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, value in full.items():
        if ".lora_" in name:
            continue
        plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        layer = name.rsplit(".base_layer.", 1)[0]
        if name.endswith(".base_layer.weight") and layer in layers:
            value = value + _delta(layers[layer], layer, full)
        found[plain] = value
    return found


def _delta(layer: Any, name: str, full: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the adapter adds to a layer's weight: scaling * B A (arXiv 2106.09685)."""
    (adapter,) = layer.active_adapters
    up, down = full[f"{name}.lora_B.{adapter}.weight"], full[f"{name}.lora_A.{adapter}.weight"]
    delta = layer.scaling[adapter] * (up @ down)
    return delta.T if layer.fan_in_fan_out else delta

"""Training whose layers' activations are computed again, against training that keeps them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.recompute import KEY, recomputable, recompute_layers
from tests.ranks import CHUNK, RUNS, Factors, Ranks, causal, together

NAMES = ("sft", "sft, one is beyond the window", "pairs", "pairs, rows padded", "rloo", "ppo", "lora")
SOME = [*itertools.product(("sft", "rloo"), range(4), ("float32", "bfloat16"))]
SOME += [(name, stage, "float32") for name in NAMES if name not in ("sft", "rloo") for stage in (0, 3)]


def kept(module: Any, work: Any) -> int:
    """Bytes of distinct tensors that the graph of `work` holds, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    held: dict[int, int] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        found = work()
    assert found.requires_grad
    return sum(held.values())


def everything(rank: int, world: int) -> dict[Any, Any]:
    found = {}
    for name, stage, dtype in SOME:
        for recompute in (False, True):
            steps, trainer = RUNS[name](Ranks(rank, world, stage, dtype, recompute=recompute))
            weights = {n: v.clone() for n, v in trainer._parameters().items()}
            found[name, stage, dtype, recompute] = (steps, weights)
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[Any, Any]]]:
    return together(everything, (1, 2), 240)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "stage", "dtype"), SOME)
def test_steps_are_the_same_to_the_last_bit(found, world, name, stage, dtype):
    for rank in range(world):
        (steps, weights), (again, others) = (
            found[world][rank][name, stage, dtype, way] for way in (False, True)
        )
        assert again == steps
        assert others.keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(others[key], value), key


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mistral"])
def test_only_the_inputs_of_layers_are_kept(kind):
    layers, width = 6, 16
    changes = {"n_layer": layers, "n_embd": width, "n_head": 2} if kind == "GPT2" else {}
    policy = PolicyModel(causal(kind, num_hidden_layers=layers, **changes), CHUNK)
    ids = torch.arange(2, 102)[None]
    ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = kept(policy, lambda: policy.inner.base_model(**ask, use_cache=False).last_hidden_state)
    recompute_layers(policy)
    after = kept(policy, lambda: policy.inner.base_model(**ask, use_cache=False).last_hidden_state)
    spared = len(recomputable(policy))
    assert spared in (layers, layers - 1)
    assert after < before * (layers - spared + 1.5) / layers


def test_a_model_without_such_layers_is_refused_by_name():
    with pytest.raises(
        ValueError, match=f"^{KEY}=true: Factors cannot be trained so: its code has no layers"
    ):
        recompute_layers(Factors(4))


def test_a_model_whose_layers_change_from_call_to_call_is_refused_by_name():
    model = causal()
    plain, calls = model.model.layers[0].forward, []

    def forward(x: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        return plain(x * len(calls), *given, **named)

    model.model.layers[0].forward = forward
    with pytest.raises(ValueError, match=f"^{KEY}=true: LlamaForCausalLM cannot be trained so: its gradient"):
        recompute_layers(model)


def test_passes_without_gradient_are_as_they_were():
    model = causal()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        recompute_layers(model)
        assert torch.equal(model(input_ids=ids).logits, before)

"""Compiled layers against the formulas in float64, against PyTorch's layers, and within whole models."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rlhf import native
from rlhf.generate.native_cache import NativeCache
from rlhf.learn.batching import pack, pad
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models import attention
from rlhf.models.packed import pack as pack_layers
from rlhf.models.precision import cast, processor_flags
from rlhf.models.trees import Tree
from rlhf.native.decoder import NativeDecoder
from rlhf.native.layers import NativeGate, NativeNorm, fuse
from rlhf.native.linear import Panels
from rlhf.native.rotary import Rotated
from rlhf.native.trees import NativeTreeAttention
from rlhf.types import Ragged, WorkItem
from tests.unit.test_generate import PROMPTS, make, second_pass
from tests.unit.test_trees import FOREST, visible

pytestmark = pytest.mark.skipif(native.library() is None, reason="no AVX512-BF16, or no compiler")
ROUNDED = 2**-8
"""The relative distance of neighbouring bfloat16 numbers."""


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).bfloat16().requires_grad_()


def in_double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("width", [16, 32, 80, 128])
@pytest.mark.parametrize("key_heads", [3, 1])
def test_attention_is_masked_attention(width, key_heads, threads):
    """Trees of all kinds (odd, empty, longer than a block), grouped heads, queries that stand out."""
    torch.manual_seed(0)
    length = sum(tree.length for tree in FOREST)
    given = [random(1, n, length, width, scale=s) for n, s in ((3, 2.0), (key_heads, 1.0), (key_heads, 1.0))]
    upper = torch.randn(1, length, 3, width).bfloat16()
    assert attention.native.serves(given[0], given[1], given[2])
    out = attention.attention(torch.nn.Module(), *given, None, trees=FOREST, scaling=0.3)[0]
    found = [out, *torch.autograd.grad(out, given, upper)]
    exact = in_double(*given)
    query, key, value = exact[0], *(x.repeat_interleave(3 // key_heads, 1) for x in exact[1:])
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~visible(), -torch.inf)
    truth = (torch.softmax(scores, -1) @ value).transpose(1, 2)
    expected = [truth, *torch.autograd.grad(truth, exact, upper.double())]
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) <= 2 * ROUNDED


def test_attention_of_what_is_no_number_is_none():
    query, key, value = (torch.randn(2, 8, 16).bfloat16() for _ in range(3))
    key[1, 2, 3] = torch.nan
    out = NativeTreeAttention.apply(query, key, value, [Tree(4, (2, 2))], 1.0)
    assert out[0].isfinite().all()
    assert out[1, :2].isfinite().all()
    assert out[1, 2:].isnan().all()


@pytest.mark.parametrize("shape", [(1, 300, 64), (2, 7, 3, 32)])
def test_norm_is_the_formula(shape, threads):
    torch.manual_seed(0)
    x, weight = random(*shape, scale=3.0), random(shape[-1])
    out = NativeNorm.apply(x, weight, 1e-5)
    upper = torch.randn(shape).bfloat16()
    exact_x, exact_weight = in_double(x, weight)
    truth = exact_x * torch.rsqrt((exact_x**2).mean(-1, keepdim=True) + 1e-5) * exact_weight
    found = [out, *torch.autograd.grad(out, (x, weight), upper)]
    expected = [truth, *torch.autograd.grad(truth, (exact_x, exact_weight), upper.double())]
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) <= ROUNDED


def test_gate_is_the_formula(threads):
    torch.manual_seed(0)
    gate, up = random(2, 40, 48, scale=20.0), random(2, 40, 48)
    out = NativeGate.apply(gate, up)
    upper = torch.randn(2, 40, 48).bfloat16()
    exact = in_double(gate, up)
    truth = torch.nn.functional.silu(exact[0]) * exact[1]
    found = [out, *torch.autograd.grad(out, (gate, up), upper)]
    for ours, theirs in zip(found, [truth, *torch.autograd.grad(truth, exact, upper.double())], strict=True):
        assert error(ours, theirs) <= ROUNDED


@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (5, 1), (3, 4)])
def test_rotation_is_that_of_complex_numbers(batch, tokens, threads):
    torch.manual_seed(0)
    x = random(batch, tokens, 3, 64).transpose(1, 2)  # as a layer makes it
    angles = torch.rand(batch, tokens, 32, dtype=torch.float64) * 20
    cos, sin = (f(angles).repeat(1, 1, 2).bfloat16() for f in (torch.cos, torch.sin))
    out = Rotated.apply(x, cos, sin)
    upper = torch.randn(out.shape).bfloat16()
    (exact,) = in_double(x)
    turned = (
        torch.complex(exact[..., :32], exact[..., 32:])
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    truth = torch.cat([turned.real, turned.imag], -1)
    for ours, theirs in (
        (out, truth),
        (torch.autograd.grad(out, x, upper)[0], torch.autograd.grad(truth, exact, upper.double())[0]),
    ):
        assert error(ours, theirs) <= ROUNDED


@pytest.mark.parametrize("rows", [1, 14, 15, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (7, 2), (40, 1026), (100, 3000)])
def test_linear_is_the_product(outputs, inputs, rows, threads):
    """Sizes that fill no panel or vector; sums in several parts; with bias and residual."""
    torch.manual_seed(0)
    x, weight, bias, residual = (
        random(*shape).detach() for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    panels = Panels(random(outputs, inputs).detach())
    panels.take(weight)
    product = x.double() @ weight.double().T
    assert error(panels(x, None), product) <= ROUNDED
    assert error(panels(x, bias), product + bias.double()) <= ROUNDED
    added = residual.clone()
    panels.multiply(x.data_ptr(), bias.data_ptr(), added.data_ptr(), added.data_ptr(), rows)
    torch.testing.assert_close(added, residual + panels(x, bias), rtol=0, atol=0)


def test_linear_refuses_other_formats_and_sizes():
    panels = Panels(random(32, 16).detach())
    for x in (torch.zeros(2, 16), torch.zeros(2, 32).bfloat16()):
        with pytest.raises(TypeError, match=r"bfloat16 \[\.\.\., 16\]"):
            panels(x, None)


SIZES = {
    "vocab_size": 30,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 1,
}
CONFIGS = [LlamaConfig(**SIZES), Qwen3Config(**SIZES), Qwen2Config(**SIZES, tie_word_embeddings=True)]
"""Plain; with norms of heads; with biases, and a head that is the embedding."""


@pytest.mark.parametrize("model_config", CONFIGS, ids=lambda c: c.model_type)
def test_a_model_computes_what_it_did(model_config, monkeypatch):
    """Log-probabilities and gradients in bfloat16, packed and compiled, are as near to float32 as the plain way."""
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(model_config).eval()
    rng = np.random.default_rng(0)
    prompts = Ragged.of([rng.integers(30, size=n) for n in (7, 20)], np.int32)
    responses = Ragged.of([rng.integers(30, size=n) for n in (9, 1, 30, 4)], np.int32)
    group = np.array([0, 0, 1, 1])

    def results(policy, way):
        flat = torch.zeros(len(responses.values))
        for batch in way(prompts, responses, group, range(4), 4096):
            logprobs = token_logprobs(policy, batch)
            logprobs.sum().backward()
            flat[batch.index] = logprobs.detach().float()
        return flat, torch.cat([p.grad.float().flatten() for p in policy.parameters()])

    ours = copy.deepcopy(exact)
    policy = PolicyModel(ours)
    assert "forward" in vars(ours.model.norm)
    assert "forward" in vars(ours.model.layers[0].mlp)
    cast(ours, torch.bfloat16)
    found = results(policy, pack)
    plain = copy.deepcopy(exact)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.native.layers.library", lambda: None)
        whole, truth = PolicyModel(plain), PolicyModel(exact)
    expected = results(truth, pad)
    monkeypatch.setattr(attention.native, "serves", lambda *_: False)
    file = __import__(type(exact).__module__, fromlist=["apply_rotary_pos_emb"])
    monkeypatch.setattr(file, "apply_rotary_pos_emb", file.apply_rotary_pos_emb.rlhf_plain)
    cast(plain, torch.bfloat16)
    theirs = results(whole, pad)
    for a, b, c in zip(found, theirs, expected, strict=True):
        assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-6
        assert (a - c).norm() <= 0.1 * c.norm()


def test_what_computes_something_else_stays_as_it_is():
    torch.manual_seed(0)
    norm = GemmaRMSNorm(32)  # 1 + weight
    mlp = LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu"))
    odd = LlamaRMSNorm(24)
    for module in (norm, mlp, odd):
        fuse(torch.nn.Sequential(module))
        assert "forward" not in vars(module)
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, attn_implementation="eager"))
    fuse(gemma)
    assert not any("forward" in vars(m) for m in gemma.modules())
    fuse(AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=30)))


class Clamped(LlamaMLP):
    """Only large numbers tell it from its parent."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x))


class Dropping(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = torch.nn.Dropout(0.1)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x * gate)


def test_what_looks_alike_stays_as_it_is():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES)
    lookalikes = (Clamped(config), Dropping(config), GatedRMSNorm(32), torch.nn.RMSNorm(32))
    for module in lookalikes:
        fuse(torch.nn.Sequential(module).eval())
        assert "forward" not in vars(module), type(module)
    elsewhere = LlamaRMSNorm(32).to("meta")
    fuse(torch.nn.Sequential(elsewhere))
    assert "forward" not in vars(elsewhere)


def test_a_fused_norm_takes_its_argument_by_name():
    norm = LlamaRMSNorm(32).bfloat16()
    x = torch.randn(3, 32).bfloat16()
    before = norm(x)
    fuse(torch.nn.Sequential(norm))
    assert "forward" in vars(norm)
    assert norm(hidden_states=x).equal(before)


def test_gradients_of_norms_are_the_same_in_every_run():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    torch.manual_seed(0)
    x, weight = random(500, 32), random(32)
    upper = torch.randn(500, 32).bfloat16()
    runs = [torch.autograd.grad(NativeNorm.apply(x, weight, 1e-5), weight, upper)[0] for _ in range(50)]
    torch.set_num_threads(before)
    assert all(run.equal(runs[0]) for run in runs)


def test_other_formats_are_computed_as_before():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    fuse(model)
    assert model(input_ids=ids).logits.equal(before)
    assert hasattr(modeling_llama.apply_rotary_pos_emb, "rlhf_plain")


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("model_config", CONFIGS, ids=lambda c: c.model_type)
def test_sampling_has_the_log_probabilities_of_a_second_pass(policy_folder, model_config, slots, threads):
    """Rows leave, others take their slots, room grows, a prompt is shared by rows that come later."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    engine = make(policy_folder, model, slots=slots, dtype="bfloat16")
    engine.max_new_tokens = engine._cache._max_new = 40
    assert isinstance(engine._cache, NativeCache)
    assert engine._cache._decoder is not None
    for seed in range(2):
        rollouts = engine.generate(WorkItem(0, PROMPTS, samples=6, seed=seed))
        assert len(set(rollouts.tokens.lengths.tolist())) > 3
        assert rollouts.tokens.lengths.max() > 16
        gap = np.abs(rollouts.logprobs - second_pass(engine, rollouts))
        assert gap.mean() <= 1e-3
        assert gap.max() <= 0.03


def test_sampling_is_near_to_float32(policy_folder):
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    engine = make(policy_folder, copy.deepcopy(exact), dtype="bfloat16")
    rollouts = engine.generate(WorkItem(0, PROMPTS, samples=4, seed=0))
    truth = second_pass(make(policy_folder, exact), rollouts)
    assert np.abs(rollouts.logprobs - truth).mean() <= 0.03  # of 2 nats


def test_new_weights_reach_every_layer(policy_folder):
    """Of a model whose head is its embedding: the gap to a second pass, and to a model that was loaded with them."""
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    engine = make(policy_folder, first, dtype="bfloat16")
    engine.set_weights({n: p.detach().bfloat16().flatten() for n, p in second.named_parameters()}, 1)
    item = WorkItem(0, PROMPTS, samples=4, seed=0)
    found, expected = engine.generate(item), make(policy_folder, second, dtype="bfloat16").generate(item)
    np.testing.assert_array_equal(found.tokens.values, expected.tokens.values)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)


def test_layers_of_the_same_parts_put_together_otherwise_are_not_decoded(policy_folder):
    """Granite's are Llama's by name, but what they add to the residual stream is scaled."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, residual_multiplier=0.5)).eval()
    engine = make(policy_folder, model, dtype="bfloat16")
    assert NativeDecoder.of(engine.model) is not None
    assert engine._cache._decoder is None
    rollouts = engine.generate(WorkItem(0, PROMPTS, samples=4, seed=0))
    assert np.abs(rollouts.logprobs - second_pass(engine, rollouts)).mean() <= 1e-3


@pytest.mark.parametrize(("values", "width"), [(16, 32), (32, 64)])
def test_layers_of_other_sizes_are_not_decoded(values, width):
    """Values narrower than keys; heads of another width in one layer: compiled code would read beyond them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    attention = model.model.layers[1].self_attn
    attention.v_proj, attention.head_dim = torch.nn.Linear(64, values, bias=False), width
    cast(model, torch.bfloat16)
    fuse(model)
    pack_layers(model, 16)
    assert NativeDecoder.of(model) is None


@pytest.fixture
def forgotten():
    """The library is looked for again, now and afterwards."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_the_library_is_built_once(tmp_path, monkeypatch, forgotten):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library() is not None
    (built,) = (tmp_path / "rlhf").iterdir()
    before = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert built.stat().st_mtime_ns == before


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, forgotten, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
    assert "no C compiler" in caplog.text
    query = torch.randn(1, 2, 6, 16).bfloat16()
    assert not attention.native.serves(query, query, query)
    out, _ = attention.attention(torch.nn.Module(), query, query, query, None, trees=[Tree(4, (2,))])
    assert out.isfinite().all()


def test_without_a_home_it_is_built_for_this_process(tmp_path, monkeypatch, forgotten):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(native.tempfile, "tempdir", None)
    monkeypatch.setattr(native.Path, "home", homeless)
    monkeypatch.setenv("CC", f"{shutil.which('cc')} -m64")  # with an option
    assert native.library() is not None
    assert list(tmp_path.glob("rlhf-*/native-*.so"))


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch, forgotten, caplog):
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
    assert "no such option" in caplog.text


def test_other_processors_are_left_alone(monkeypatch, forgotten):
    monkeypatch.setattr(native, "processor_flags", lambda: processor_flags() - {"avx512_bf16"})
    assert native.library() is None

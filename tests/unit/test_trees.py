"""Attention over trees against masked attention over whole sequences, values and gradients."""

import pytest
import torch

from rlhf.models import attention, trees
from rlhf.models.trees import Tree

FOREST = [Tree(5, (3, 1, 9, 70)), Tree(0, (4,)), Tree(200, (30, 2, 40)), Tree(1)]
HEADS, WIDTH = 4, 8


def visible() -> torch.Tensor:
    """What each token of the forest sees, bool [T, T], token by token."""
    whose = [
        (t, r)
        for t, tree in enumerate(FOREST)
        for r, n in enumerate((tree.prompt, *tree.responses))
        for _ in range(n)
    ]
    seen = [
        [j <= i and whose[j][0] == whose[i][0] and whose[j][1] in (0, whose[i][1]) for j in range(len(whose))]
        for i in range(len(whose))
    ]
    return torch.tensor(seen)


def results(attend, dtype: torch.dtype, key_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    length = sum(tree.length for tree in FOREST)
    given = [torch.randn(1, heads, length, WIDTH).to(dtype) for heads in (HEADS, key_heads, key_heads)]
    given = [x.requires_grad_() for x in given]
    out = attend(*given)
    out.backward(torch.randn(out.shape).to(dtype))
    return [out.detach().double(), *(x.grad.double() for x in given)]


def truth(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~visible(), -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).to(query.dtype)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("short", [trees.SHORT, 0], ids=["own", "library"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_masked_attention(dtype, tolerance, short, key_heads, monkeypatch):
    monkeypatch.setattr(trees, "SHORT", short)
    forest = [Tree(tree.prompt, tree.responses) for tree in FOREST]

    def ours(query, key, value):
        return attention.attention(torch.nn.Module(), query, key, value, None, trees=forest, scaling=0.3)[0]

    for found, expected in zip(
        results(ours, dtype, key_heads), results(truth, dtype, key_heads), strict=True
    ):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_little_is_computed_that_is_hidden():
    tree = Tree(300, (32,) * 8)
    parts = tree.parts(torch.zeros(1))
    assert sum(part.mask.numel() for part in parts) <= 1.3 * sum(
        int((part.mask == 0).sum()) for part in parts
    )

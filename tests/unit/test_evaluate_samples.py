"""The samples file, and the builder of small samples that the other evaluation tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.evaluate import record
from rlhf.evaluate.record import load_samples, save_samples
from rlhf.evaluate.samples import PolicySamples
from rlhf.types import prompt_id


def policy(
    judged: dict[str, Any],
    reference: dict[str, Any],
    meta: list[dict[str, Any]] | None = None,
    texts: list[list[str]] | None = None,
    prompts: list[Any] | None = None,
    log_ratio: Any = None,
) -> PolicySamples:
    """Samples whose reward models judge; what a test does not care about is filled in."""
    scores = {name: np.asarray(s, np.float32) for name, s in judged.items()}
    references = {name: np.asarray(r, np.float32) for name, r in reference.items()}
    shape = next(iter(scores.values())).shape
    prompts = prompts or [f"prompt {p}" for p in range(shape[0])]
    texts = texts or [[f"answer {p} {i}" for i in range(shape[1])] for p in range(shape[0])]
    return PolicySamples(
        prompts=tuple(prompts),
        prompt_ids=np.array([prompt_id(p) for p in prompts], np.uint64),
        meta=tuple(meta or [{}] * shape[0]),
        texts=tuple(tuple(row) for row in texts),
        lengths=np.array([[len(t.split()) for t in row] for row in texts], np.int32),
        finished=np.ones(shape, bool),
        rewards=scores,
        reference=references,
        judged=scores,
        judge_reference=references,
        log_ratio=np.zeros(shape, np.float32) if log_ratio is None else np.asarray(log_ratio, np.float32),
    )


def example() -> PolicySamples:
    return policy(
        {"a": [[1, 2], [3, 4]], "b": [[0.1, 0.2], [0.3, -1e-30]]},
        {"a": [1.5, 3], "b": [0, 0]},
        meta=[{"topic": "tea", "unsafe": False, "rank": np.int64(3)}, {"topic": "été", "tags": ["x"]}],
        texts=[["one", "two\n"], ['"quoted"', "\u2028 <b>"]],
        prompts=["plain", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]],
    )


def test_samples_survive_a_round_trip(tmp_path: Path) -> None:
    before = example()
    save_samples(tmp_path / "base.npz", before)
    after = load_samples(tmp_path / "base.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["base.npz"]
    assert (after.prompts, after.texts) == (before.prompts, before.texts)
    assert [prompt_id(p) for p in after.prompts] == before.prompt_ids.tolist()
    assert after.meta == ({"topic": "tea", "unsafe": False, "rank": 3}, {"topic": "été", "tags": ["x"]})
    for name in ("prompt_ids", "lengths", "finished", "log_ratio"):
        old, new = getattr(before, name), getattr(after, name)
        assert new.dtype == old.dtype
        assert np.array_equal(new, old)
    for name in ("rewards", "reference", "judged", "judge_reference"):
        old, new = getattr(before, name), getattr(after, name)
        assert list(new) == ["a", "b"]
        assert all(np.array_equal(new[k], old[k]) and new[k].dtype == np.float32 for k in old)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "base.npz"
    save_samples(path, example())
    old = path.read_bytes()

    def full_disk(file: Any, **columns: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(record.np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_samples(path, example())
    assert path.read_bytes() == old

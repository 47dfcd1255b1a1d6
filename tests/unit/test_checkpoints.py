"""Checkpoints that are cut off, corrupt or half made; keys that may differ across them; metrics that are set back."""

import json
from pathlib import Path

import pytest

from rlhf.changes import check_same
from rlhf.checkpoints import MANIFEST, Checkpoints, read
from rlhf.checksums import checksum
from rlhf.logs import MetricsWriter, read_metrics


def save(checkpoints: Checkpoints, step: int, besides: tuple[int, ...] = ()) -> None:
    folder = checkpoints.begin(step)
    (folder / "rank-0").write_bytes(bytes([step]) * 100)
    checkpoints.commit(step, folder, {"n": step}, {"rank-0": checksum(folder / "rank-0")}, besides)


def cut(folder: Path) -> None:
    (folder / "rank-0").write_bytes(bytes(99))


def flip(folder: Path) -> None:
    content = bytearray((folder / "rank-0").read_bytes())
    content[50] ^= 1
    (folder / "rank-0").write_bytes(content)


def flip_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"n": 3', '"n": 8'))


def cut_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def lose_file(folder: Path) -> None:
    (folder / "rank-0").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [cut, flip, flip_manifest, cut_manifest, lose_file, lose_manifest])
def test_of_a_damaged_checkpoint_the_one_before_is_used(tmp_path, damage):
    checkpoints, said = Checkpoints(tmp_path, keep=3), []
    for step in (1, 2, 3):
        save(checkpoints, step)
    damage(tmp_path / "step-000003")
    found = checkpoints.newest(said.append)
    assert found is not None
    assert (found.step, found.state, found.folder) == (2, {"n": 2}, tmp_path / "step-000002")
    (line,) = said
    assert "step-000003" in line
    assert checkpoints.steps() == [1, 2]


def test_the_newest_and_the_best_are_kept_and_a_half_made_one_counts_for_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(checkpoints, step, besides=(1,))
    assert checkpoints.steps() == [1, 3, 4]
    (checkpoints.begin(5) / "rank-0").write_text("half")  # killed here
    assert checkpoints.newest(pytest.fail).step == 4
    save(checkpoints, 5)
    assert checkpoints.steps() == [4, 5]
    checkpoints.back_to(4)
    save(checkpoints, 4)  # again, in a history that was set back
    assert checkpoints.steps() == [4]
    assert Checkpoints(tmp_path / "none", keep=1).newest(pytest.fail) is None
    with pytest.raises(ValueError, match="no whole checkpoint"):
        read(tmp_path / "none")


def test_keys_that_make_another_history_are_named():
    before = {
        "seed": 0,
        "align": {"kl_coef": 0.3, "steps": 10, "checkpoint": {"keep": 2}},
        "logging": {"live": "off"},
    }
    after = json.loads(json.dumps(before))
    after["align"] |= {"steps": 20, "checkpoint": {"keep": 1}}
    after["logging"] = None
    check_same(before, after, "it")
    after["align"]["kl_coef"], after["reward_models"] = [[0, 0.3]], {"helpful": {}}
    with pytest.raises(
        ValueError, match=r"align.kl_coef \(0.3 there, \[\[0, 0.3\]\] here\), reward_models.helpful"
    ):
        check_same(before, after, "it")


def test_metrics_go_on_after_the_steps_of_a_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write({"step": step, "attempt": 1})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "att')  # killed here
    writer = MetricsWriter(tmp_path, 2)
    writer.write({"step": 3, "attempt": 2})
    writer.close()
    assert [(m["step"], m["attempt"]) for m in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 2)]
    with pytest.raises(ValueError, match="less than the 5 lines"):
        MetricsWriter(tmp_path, 5)

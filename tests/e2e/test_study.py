"""A sweep of methods, coefficients and seeds, and its comparison."""

import json
import re

import pytest

from tests.e2e.command import rlhf

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900, method="signal")]

TINY = [
    "experiment=study_quick",
    "seed=0,1",
    "arm=lsc,linear",
    "study.point=strong,weak",
    "data.microcosm={demonstrations: 800, pairs: 200, eval_share: 0.2, seed: 0}",
    "data.train_size=16",
    "data.eval_size=12",
    "policy.training.steps=40",
    "reward_models.helpful.training.steps=4",
    "reward_models.harmless.training.steps=4",
    "rollout.prompts_per_item=8",
    "baseline.samples=4",
    "align.steps=3",
    "align.prompts_per_step=8",
    "align.samples_per_prompt=3",
    "evaluate={samples: 4, judge_samples: 4, level: 0.85, best_of: [2]}",
]


def test_a_study_compares_its_cells_and_goes_on_where_it_stopped(tmp_path):
    done = rlhf("-m", *TINY[:1], "seed=0", *TINY[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    done = rlhf("-m", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert done.stdout.count("align: skipped, done before") == 4  # the cells of seed 0
    assert done.stdout.count("align: done") == 4
    folder = max((tmp_path / "outputs" / "sweeps").iterdir())
    summary = json.loads((folder / "summary.json").read_text())
    comparison = summary["comparison"]
    assert comparison["arms"] == ["lsc", "linear", "best_of_n"]
    assert comparison["seeds"]["linear"] == [0, 1]
    assert comparison["cells"] == 8
    assert comparison["incomplete"] == []
    assert comparison["differences"]["linear"]["win/gold/joint"]["seeds"] == [0, 1]
    assert {"win/evaluator/joint", "left_behind/joint", "hacking/length"} <= set(comparison["metrics"])
    cells = {(f["arm"], f["point"], f["seed"]): f for f in summary["figures"]}
    assert cells["lsc", 0, 0]["kl_coef"] > cells["lsc", 2, 0]["kl_coef"]
    assert re.search(r"lsc − linear", done.stdout)
    for name in ("comparison.html", "pareto.svg", "pareto.png"):
        assert (folder / name).stat().st_size > 1000

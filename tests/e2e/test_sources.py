"""Three kinds of rewards under one expression: a classifier, a Python verifier that does not apply to every prompt, and
a judge that `transformers serve` runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.evaluate.record import load_samples
from rlhf.models.reward import RewardScorer
from tests.e2e.command import rlhf
from tests.servers import free_port, transformers_serve
from tests.tiny import WORDS, save_policy, save_reward_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, method="signal")]

RUBRIC = "is {{ response }} good ?"
VERIFIER = """
def within(completions, most, **_):
    return [None if m is None else len(c.split()) <= m for c, m in zip(completions, most)]
"""


def save_judge(folder: Path) -> Path:
    """A policy taught to say "yes" of a text that has "tea" or "bread" in it, and "no" of others."""
    save_policy(folder, seed=7)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng(0)
    adam = torch.optim.Adam(model.parameters(), 3e-3)

    def example() -> tuple[list[int], int]:
        words = rng.choice(WORDS, rng.integers(0, 12)).tolist()
        content = RUBRIC.replace("{{ response }}", " ".join(words))
        asked = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        return ids, tokenizer.convert_tokens_to_ids("yes" if {"tea", "bread"} & {*words} else "no")

    for _ in range(250):
        batch = [example() for _ in range(32)]
        width = max(len(ids) for ids, _ in batch)
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in batch])
        logits = model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([answer for _, answer in batch]))
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Its address, and the folder that is its name."""
    folder = str(save_judge(tmp_path_factory.mktemp("judge")))
    with transformers_serve(folder) as url:
        yield url, folder


def said(folder: str, text: str) -> str:
    """The judge's own greedy answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": RUBRIC.replace("{{ response }}", text)}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=1)[0, ids.shape[1] :]).strip()


def test_one_expression_of_three_kinds_end_to_end(judge, tmp_path):
    url, model = judge
    rows = [
        {"prompt": f"what {w} {v} ?", "most": None if w == "lock" else 4}
        for w in ("tea", "bread", "lock", "good")
        for v in ("is", "and", "the", "do")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "verifier.py").write_text(VERIFIER)
    policy = save_policy(tmp_path / "policy")
    save_reward_model(tmp_path / "helpful", 1)
    done = rlhf(
        "data=files", f"data.prompts={tmp_path}/prompts.jsonl", "data.eval_size=8", f"policy.path={policy}",
        "reward_models=none",
        "+source@reward_models.helpful=classifier", f"reward_models.helpful.path={tmp_path}/helpful",
        "+source@reward_models.within=function", f"reward_models.within.path={tmp_path}/verifier.py:within",
        "reward_models.within.scale=verdict",
        "+source@reward_models.fond=judge", f"reward_models.fond.url={url}", f"reward_models.fond.model={model}",
        f"reward_models.fond.rubric='{RUBRIC}'", "reward_models.fond.answer=verdict", "reward_models.fond.accept='yes'",
        "reward_models.fond.reject='no'", "reward_models.fond.scale=verdict", "reward_models.fond.max_tokens=2",
        "utility.combine='helpful & (within | ~fond)'",
        "rollout.max_new_tokens=8", "rollout.prompts_per_item=4", "baseline.samples=8", "align.steps=3",
        "align.prompts_per_step=4", "align.samples_per_prompt=4", "evaluate.samples=4", "evaluate.best_of=[2]",
        "evaluate.judge_samples=4", f"output_dir={tmp_path}/out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    latest = tmp_path / "out/latest"
    summary = json.loads((latest / "summary.json").read_text())
    kinds = {name: (r["kind"], r["scale"]) for name, r in summary["rewards"].items()}
    assert kinds == {
        "helpful": ("classifier", "bradley_terry"), "within": ("function", "verdict"), "fond": ("judge", "verdict")
    }  # fmt: skip
    base, aligned = (load_samples(latest / "evaluate" / f"{p}.npz") for p in ("base", "aligned"))
    absent = np.array([meta["most"] is None for meta in aligned.meta])
    assert 0 < absent.sum() < 8
    assert summary["rewards"]["within"]["absent"] == absent.mean()
    scorer = RewardScorer("helpful", str(tmp_path / "helpful"))
    for p, texts in enumerate(aligned.texts):
        expected = scorer.score([aligned.prompts[p]] * 4, texts)
        np.testing.assert_allclose(aligned.rewards["helpful"][p], expected, atol=1e-4)
        most = aligned.meta[p]["most"]
        within = [np.nan] * 4 if most is None else [float(len(t.split()) <= most) for t in texts]
        np.testing.assert_array_equal(aligned.rewards["within"][p], within)
    some = [(p, i) for p in range(0, 8, 3) for i in (0, 3)]
    for p, i in some:
        verdict = {"yes": 1.0, "no": 0.0}[said(model, aligned.texts[p][i])]
        assert aligned.rewards["fond"][p, i] == verdict
    assert len(np.unique(base.rewards["fond"])) == 2  # it tells responses apart
    page = (latest / "report.html").read_text()
    for name in kinds:
        assert re.search(rf"<td>{name}</td><td>{kinds[name][0]}<", page)
    steps = [json.loads(line) for line in (latest / "align/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    for step in steps:  # P(good) of the expression, from the means of its parts where they are constant
        assert step["utility/combined"] < 0
        assert 0.05 - 1e-6 <= step["p_good/fond"] <= 0.95 + 1e-6
    assert any("absent/within" in step for step in steps)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            "function reward_models.rule.path=verifier.py:f reward_models.rule.scale=verdict",
            r"error: reward source 'rule' \(verifier.py:f\) raised ZeroDivisionError: division by zero for prompt "
            r"'what .* \?', response '.*' \(in reward-rule\)",
        ),
        (
            "http reward_models.rule.url=http://127.0.0.1:PORT/get_reward reward_models.rule.protocol=openrlhf "
            "reward_models.rule.scale=log_odds reward_models.rule.retries=1 reward_models.rule.backoff=0.1",
            r"error: reward source 'rule' \(http://127.0.0.1:PORT/get_reward\) gave no answer: Connection refused, "
            r"after 2 tries in 0 s; is it running\? \(in reward-rule\)",
        ),
    ],
    ids=["a function that raises", "a server that is not there"],
)
def test_a_source_that_fails_ends_the_run_with_one_line(tmp_path, source, line):
    port = str(free_port())
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "what {w} ?"}}\n' for w in WORDS[:8]))
    (tmp_path / "verifier.py").write_text("def f(completions): return [1 / 0 for c in completions]\n")
    policy = save_policy(tmp_path / "policy")
    done = rlhf(
        "data=files", f"data.prompts={tmp_path}/prompts.jsonl", "data.eval_size=2", f"policy.path={policy}",
        "reward_models=none", *f"+source@reward_models.rule={source.replace('PORT', port)}".split(),
        "rollout.max_new_tokens=8", "rollout.prompts_per_item=2", "align.prompts_per_step=4", "stages=[baseline]",
        f"output_dir={tmp_path}/out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(line.replace("PORT", port), done.stderr.splitlines()[-1]), done.stderr[-2000:]

"""Input nobody made for us: a policy of another tokenizer, and reward models saved by TRL's RewardTrainer."""

import json

import pytest

from rlhf.evaluate.record import load_samples
from tests.e2e.command import rlhf
from tests.tiny import config, save_policy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, method="signal")]
WORDS = ["what", "is", "tea", "bread", "good", "bad", "lock", "open", "make", "yes"]


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{a} {b} ?"}], "n": 1} for a in WORDS for b in WORDS[:3]]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_reward_model(folder, wanted: str):
    """A byte-level BPE tokenizer and a Llama classifier, trained by TRL to like a word."""
    from datasets import Dataset
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(WORDS)] * 5, vocab_size=320, special_tokens=["<|pad|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    model = LlamaForSequenceClassification(config(len(tokenizer), num_labels=1))
    chat = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {
            "prompt": chat("user", f"{a} ?"),
            "chosen": chat("assistant", f"{b} {wanted}"),
            "rejected": chat("assistant", b),
        }
        for a in WORDS
        for b in WORDS
        if b != wanted
    ]
    arguments = RewardConfig(
        output_dir=str(folder / "trl"), max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def test_conversations_a_policy_and_reward_models_of_another_tool(tmp_path, prompts):
    policy = save_policy(tmp_path / "policy")
    models = {
        name: train_reward_model(tmp_path / name, word) for name, word in (("warm", "tea"), ("kind", "good"))
    }
    done = rlhf(
        "data=files",
        f"data.prompts={prompts}",
        "data.eval_size=8",
        f"policy.path={policy}",
        "reward_models=none",
        *(f"+source@reward_models.{n}=classifier" for n in models),
        *(f"reward_models.{n}.path={p}" for n, p in models.items()),
        "rollout.max_new_tokens=8",
        "rollout.prompts_per_item=4",
        "baseline.samples=16",
        "align.steps=12",
        "align.prompts_per_step=8",
        "align.kl_coef=0.02",
        "align.learning_rate=0.01",
        f"output_dir={tmp_path / 'outputs'}",
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert "sft: skipped, policy.path=" in done.stdout
    assert "reward_models: skipped, reward_models.warm is given (classifier: " in done.stdout
    latest = tmp_path / "outputs" / "latest"
    summary = json.loads((latest / "summary.json").read_text())
    assert summary["judge"] == "reward_models"
    assert summary["win_rate"]["joint"]["aligned"] > summary["win_rate"]["joint"]["base"] + 0.1
    aligned, base = (load_samples(latest / "evaluate" / f"{p}.npz") for p in ("aligned", "base"))
    for name in models:
        assert aligned.rewards[name].mean() > base.rewards[name].mean()

"""What is loaded, and what is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models.load import load_config, load_policy, load_reward_model, load_tokenizer, new_reward_model
from rlhf.models.lora import is_adapted
from rlhf.models.source import trust_remote_code
from rlhf.store import source_fingerprint
from tests.tiny import save_policy, tokenizer

KEY = "reward_models.helpful.path"


@pytest.fixture
def changed(tmp_path, reward_folders):
    """`changed(change)`: a reward model whose weights went through `change`."""

    def make(change):
        folder = shutil.copytree(reward_folders["helpful"], tmp_path / "changed")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return make


def rename(weights):
    weights["value_head.weight"] = weights.pop("score.weight")


def drop(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def reshape(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 5)


def spoil(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (rename, r"score.weight is not there; it has no place for value_head.weight"),
        (drop, r"model.layers.1.mlp.up_proj.weight is not there"),
        (reshape, r"model.layers.1.mlp.up_proj.weight has the shape \[5, 5\], not \[64, 32\]"),
        (spoil, r"the weight model.layers.1.mlp.up_proj.weight has NaN"),
    ],
)
def test_weights_that_would_be_random_are_refused(changed, change, fault):
    folder = changed(change)
    with pytest.raises(ValueError, match=rf"^{KEY}={folder} cannot be loaded: .*{fault}$"):
        load_reward_model(folder, KEY)
    if change is rename:  # a new head is meant, and its body is whole
        assert not new_reward_model(folder, KEY, 0, 0).score.weight.any()
    else:
        with pytest.raises(ValueError, match=fault):
            new_reward_model(folder, KEY, 0, 0)


def test_weights_without_a_place_are_told_of(changed, caplog):
    folder = changed(lambda weights: weights.update({"v_head.weight": torch.zeros(1, 32)}))
    load_reward_model(folder, KEY)
    assert f"{KEY}={folder}: not read, as the model has no place for them: v_head.weight" in caplog.text


def test_a_tied_head_is_not_missing(tmp_path):
    folder = save_policy(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_policy(str(folder))


def test_a_broken_file_is_one_line(reward_folders, tmp_path):
    folder = shutil.copytree(reward_folders["helpful"], tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"^{KEY}={folder} cannot be loaded: [^\n]+$"):
        load_reward_model(str(folder), KEY)


def test_each_kind_is_told_from_the_other(policy_folder, reward_folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"is a causal language model \(LlamaForCausalLM\), which has no head"
    ):
        load_reward_model(str(policy_folder), KEY)
    with pytest.raises(ValueError, match=r"^policy.path=.* is for sequence classification \(LlamaForSeq"):
        load_policy(str(reward_folders["helpful"]))
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a causal language model"):
        load_reward_model(str(tmp_path), KEY)
    settings = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["LLMForSequenceRegression"]
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"score.weight is not there; it has no place for lm_head.weight"):
        load_reward_model(str(tmp_path), KEY)


def save_adapter(base, folder, model, task):
    """A random LoRA adapter, saved as peft does; the adapted model."""
    import peft

    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=task, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    return adapted.eval()


IDS = torch.tensor([[7, 8, 9, 3]])


@torch.no_grad()
def test_an_adapter_is_merged_into_its_base(policy_folder, tmp_path):
    policy = save_adapter(
        policy_folder, tmp_path / "p", AutoModelForCausalLM.from_pretrained(policy_folder), "CAUSAL_LM"
    )
    found = load_policy(str(tmp_path / "p"))
    assert [n for n, _ in found.named_parameters()] == [
        n for n, _ in load_policy(str(policy_folder)).named_parameters()
    ]
    torch.testing.assert_close(found(IDS).logits, policy(IDS).logits, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in found.parameters())
    assert not is_adapted(found)
    assert load_config(str(tmp_path / "p"), "policy.path").vocab_size == 26
    plain = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    rewards = save_adapter(policy_folder, tmp_path / "r", plain, "SEQ_CLS")
    found = load_reward_model(str(tmp_path / "r"), KEY)
    torch.testing.assert_close(found(IDS).logits, rewards(IDS).logits, atol=1e-4, rtol=1e-4)
    body = new_reward_model(str(tmp_path / "p"), KEY, 0, 0)
    assert all(p.requires_grad for p in body.parameters())
    torch.testing.assert_close(
        body.model.layers[1].mlp.up_proj.weight,
        load_policy(str(tmp_path / "p")).model.layers[1].mlp.up_proj.weight,
    )
    for load, name in ((load_reward_model, "p"), (load_policy, "r")):
        with pytest.raises(
            ValueError, match=r"is a causal language model \(CAUSAL_LM|classification \(SEQ_CLS"
        ):
            load(str(tmp_path / name), KEY)


def test_an_adapters_tokenizer_is_its_own_or_its_bases(policy_folder, tmp_path):
    save_adapter(policy_folder, tmp_path, AutoModelForCausalLM.from_pretrained(policy_folder), "CAUSAL_LM")
    assert load_tokenizer(str(tmp_path), "policy.path").get_vocab() == tokenizer().get_vocab()
    own = tokenizer(["other"])
    own.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), "policy.path").get_vocab() == own.get_vocab()


def test_an_adapter_is_another_with_another_base(policy_folder, tmp_path):
    base = shutil.copytree(policy_folder, tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM")
    before = source_fingerprint(str(tmp_path / "adapter"))
    save_policy(base, seed=1)
    assert source_fingerprint(str(tmp_path / "adapter")) != before
    shutil.rmtree(base)
    with pytest.raises(
        ValueError, match=rf"^policy.path=.* is an adapter whose base is not there: .*={base}: no such"
    ):
        load_policy(str(tmp_path / "adapter"))


def test_a_trainers_folder_names_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        save_policy(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=rf"no config.json; .* give {tmp_path}/checkpoint-10$"):
        load_policy(str(tmp_path))


def test_a_tokenizer_of_one_file_is_loaded(policy_folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(policy_folder / name, tmp_path)
    assert load_tokenizer(str(tmp_path), "policy.path")("what is tea")["input_ids"] == [6, 7, 10]


CODE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnClassifier(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = LlamaModel(config), torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        states = self.model(input_ids, attention_mask).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(states)[:, -1])
"""


@pytest.fixture
def own_code(reward_folders, tmp_path):
    folder = shutil.copytree(reward_folders["helpful"], tmp_path / "own")
    (folder / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnClassifier"}
    changes = {"model_type": "own_llama", "architectures": ["OwnClassifier"], "auto_map": classes}
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    yield str(folder)
    trust_remote_code(False)


def test_code_of_a_model_is_run_only_if_allowed(own_code, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a question was asked"))
    refused = rf"^{KEY}={own_code} brings code of its own, .*trust_remote_code=true"
    for load in (load_config, load_reward_model):
        with pytest.raises(ValueError, match=refused):
            load(own_code, KEY)
    trust_remote_code(True)
    model = load_reward_model(own_code, KEY)
    assert type(model).__name__ == "OwnClassifier"
    model.save_pretrained(tmp_path / "again")
    assert type(load_reward_model(str(tmp_path / "again"), KEY)).__name__ == "OwnClassifier"

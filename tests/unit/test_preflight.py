"""The checks of data, models and machine before Ray starts (they need none)."""

import json
import os
import socket

import pytest
from transformers import BartConfig, BertConfig, WhisperConfig, XLNetConfig

from actors.preflight import preflight
from actors.resources import check_offer
from rlhf.store import Store
from tests.tiny import save_policy, save_reward_model
from tests.unit.test_config import config


@pytest.fixture
def given(tmp_path, policy_folder, reward_folders):
    """`given(rows, *overrides)` runs the preflight on a prompts file of these rows."""

    def run(rows, *overrides):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = [
            "data=files",
            f"data.prompts={path}",
            "data.eval_size=1",
            f"policy.path={policy_folder}",
            *(f"reward_models.{name}.path={folder}" for name, folder in reward_folders.items()),
        ]
        return preflight(config(*values, *overrides), Store(tmp_path / "store"))

    return run


def prompt(text: str) -> dict:
    return {"prompt": [{"role": "user", "content": text}]}


GOOD = [prompt("what is tea ?"), prompt("what is bread ?"), prompt("is tea good ?")]


def test_good_input_passes_and_holds_out(given):
    data = given(GOOD)
    assert (len(data.prompts), len(data.eval_prompts)) == (2, 1)
    assert not {p.id for p in data.prompts} & {p.id for p in data.eval_prompts}


def test_several_files_and_numbers_from_csv(given, tmp_path):
    rows = [["what is tea ?", 1], ["what is bread ?", "-0.5"]]
    for name, (text, number) in zip(("a.csv", "b.csv"), rows, strict=True):
        talk = json.dumps(prompt(text)["prompt"]).replace('"', '""')
        (tmp_path / name).write_text(f'prompt,r\n"{talk}",{number}\n')
    (tmp_path / "held_out.jsonl").write_text(json.dumps({**GOOD[2], "r": 2.5}))
    reference = ["reward_models.helpful.reference=column", "reward_models.helpful.column=r"]
    sources = [f"data.prompts={tmp_path}/*.csv", f"data.eval_prompts=[{tmp_path}/held_out.jsonl]"]
    data = given(GOOD, *sources, *reference)
    assert [p.content for p in [*data.prompts, *data.eval_prompts]] == [row["prompt"] for row in GOOD]
    assert [value for _, value in data.column("r")] == [1.0, -0.5, 2.5]


def test_missing_and_empty_files(given, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such file"):
        given(GOOD, "data.prompts=nowhere.jsonl")
    with pytest.raises(ValueError, match=r"prompts.jsonl: the dataset is empty"):
        given([])


def test_row_without_a_prompt_names_file_and_line(given):
    with pytest.raises(ValueError, match=r"prompts.jsonl:2.* no prompt"):
        given([GOOD[0], {"question": "what is tea ?"}, GOOD[1]])


def test_prompt_longer_than_the_model_names_the_row(given):
    with pytest.raises(
        ValueError, match=r"prompts.jsonl:2: a prompt of 1\d\d tokens .* the policy's 128 positions"
    ):
        given([GOOD[0], prompt("tea " * 110), GOOD[1]])


def test_all_prompts_held_out(given):
    with pytest.raises(ValueError, match=r"data.eval_size=3 would hold out all of the 3 prompts"):
        given(GOOD, "data.eval_size=3")


def test_missing_policy(given, tmp_path):
    with pytest.raises(ValueError, match=r"policy.path=/nowhere/policy: no such folder"):
        given(GOOD, "policy.path=/nowhere/policy")
    with pytest.raises(ValueError, match=r"policy.path=.*: the folder holds no config.json"):
        given(GOOD, f"policy.path={tmp_path}")


def test_reward_model_with_two_labels(given, tmp_path):
    folder = save_reward_model(tmp_path / "two", seed=0, labels=2)
    with pytest.raises(
        ValueError, match=r"reward_models.helpful.path=.*: a reward model has one label, .* has 2"
    ):
        given(GOOD, f"reward_models.helpful.path={folder}")


def test_tokens_beyond_an_embedding_table_name_model_token_and_size(given, tmp_path):
    small, padded = (save_policy(tmp_path / str(rows), vocab_size=rows) for rows in (20, 64))
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(json.dumps(GOOD[0] | {"completion": [{"role": "assistant", "content": "yes"}]}))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "what", "chosen": " yes", "rejected": " no"}))
    trained = ["policy.path=null", f"data.demonstrations={demonstrations}"]
    helpful = ["reward_models.helpful.path=null", f"reward_models.helpful.preferences={pairs}"]
    refused = r"its tokenizer uses the token 'open' \(20\), but its embedding table has 20 rows"
    for owner, key, others in (
        ("policy", "policy.path", []),
        ("policy", "policy.init_from", trained),
        ("reward model 'helpful'", "reward_models.helpful.init_from", helpful),
    ):
        with pytest.raises(ValueError, match=f"^{owner}: {refused}"):
            given(GOOD, *others, f"{key}={small}")
        given(GOOD, *others, f"{key}={padded}")


def test_a_causal_model_as_reward_model(given, policy_folder):
    with pytest.raises(
        ValueError, match=r"reward_models.helpful.path=.* is a causal language model \(LlamaForCausalLM\)"
    ):
        given(GOOD, f"reward_models.helpful.path={policy_folder}")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BertConfig(vocab_size=60), "look both ways; .* is_decoder=true"),
        (XLNetConfig(vocab_size=60), "look ahead"),
        (BartConfig(vocab_size=60), "an encoder"),
        (WhisperConfig(), "sound"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_a_model_that_can_be_no_policy_is_refused_by_name(given, tmp_path, config, why):
    config.save_pretrained(tmp_path / "odd")
    with pytest.raises(
        ValueError, match=f"policy.path=.*of the type '{config.model_type}', .* policy: .*{why}"
    ):
        given(GOOD, f"policy.path={tmp_path / 'odd'}")


def test_reward_model_too_short_for_a_prompt_names_the_row(given, tmp_path):
    folder = save_reward_model(tmp_path / "short", seed=0, max_position_embeddings=16)
    given(GOOD, f"reward_models.harmless.path={folder}")
    with pytest.raises(
        ValueError,
        match=rf"prompts.jsonl:2: .* 3\d tokens, but .* reward_models.harmless.path={folder} takes 16",
    ):
        given([GOOD[0], prompt("tea " * 30), GOOD[1]], f"reward_models.harmless.path={folder}")


def test_code_that_comes_with_a_model_needs_leave(given, tmp_path, caplog):
    folder = save_reward_model(tmp_path / "own", seed=0)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    given_path = f"reward_models.harmless.path={folder}"
    with pytest.raises(ValueError, match=rf"{given_path} brings code of its own, .*trust_remote_code=true"):
        given(GOOD, given_path)
    assert not caplog.text
    with pytest.raises(
        ValueError, match=rf"{given_path}: transformers has no sequence classifier of the type 'own'"
    ):
        given(GOOD, given_path, "trust_remote_code=true")
    assert "trust_remote_code=true: code that comes with" in caplog.text


def test_an_adapter_is_told_of(given, policy_folder, tmp_path, caplog):
    import peft

    settings = peft.LoraConfig(base_model_name_or_path=str(policy_folder), task_type="CAUSAL_LM")
    settings.save_pretrained(tmp_path / "adapter")
    given(GOOD, f"policy.path={tmp_path / 'adapter'}")
    assert (
        f"policy.path={tmp_path / 'adapter'} is an adapter: it is merged into {policy_folder}" in caplog.text
    )


def test_conversation_without_a_chat_template_names_the_key(given, tmp_path):
    folder = save_reward_model(tmp_path / "plain", seed=0)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"reward_models.harmless.chat_template"):
        given(GOOD, f"reward_models.harmless.path={folder}")
    given(GOOD, f"reward_models.harmless.path={folder}", "reward_models.harmless.chat_template=hh")


def test_more_ranks_than_cpus_says_both_numbers(given):
    here = len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=rf"resources.learner.count=99 asks for 99 .* has {here} CPUs"):
        given(GOOD, "resources.learner.count=99", "resources.learner.cpus=0.001")
    with pytest.raises(ValueError, match=r"the roles ask for .* CPUs together, there are"):
        given(GOOD, "resources.generators.cpus=99")


def test_gpus_that_a_cluster_lacks_are_refused_unless_it_grows():
    asking = ["resources.learner={count: 2, cpus: 0.1, gpus: 1}"]
    with pytest.raises(ValueError, match=r"the roles ask for 2 GPUs together, there are 0"):
        check_offer(config(*asking), [{"CPU": 8.0, "GPU": 0.0}])
    check_offer(config(*asking, "resources.autoscaling=true"), [{"CPU": 8.0, "GPU": 0.0}])


def test_port_in_use(given):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"resources.dashboard_port={port}: the port is in use"):
            given(GOOD, f"resources.dashboard_port={port}")


def test_unknown_transform(given):
    with pytest.raises(ValueError, match=r"utility.transform=square is not one of .*lsc"):
        given(GOOD, "utility=linear", "utility.transform=square")

"""Data sets as tokens: which rows count as no pair, and errors that name the row."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from rlhf.learn.tokenise import demonstration_tokens, preference_tokens
from tests.tiny import save_reward_model
from tests.unit.test_config import config

KEY = "reward_models.helpful"


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}


GOOD = pair("what is tea ?", "good .", "bad .")
LONG = pair("is tea good ?", "yes " * 130, "no")
SAME = pair("is bread good ?", "yes  .", "yes .")  # the tokenizer splits at spaces
EQUAL = pair("is a lock good ?", "no .", "no .")


@pytest.fixture
def write(tmp_path):
    def written(*rows: dict) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_reward_model(tmp_path_factory.mktemp("reward"), seed=0))


def test_rows_that_are_no_pair_for_the_model_count_to_the_tolerated_share(write, folder, caplog):
    source = write(GOOD, LONG, SAME, EQUAL, {"prompt": "a"}, GOOD)
    found, ids = preference_tokens(KEY, None, folder, source, tolerated_share=0.7)
    assert len(set(ids.tolist())) == 1 == len(set(map(len, (ids[:1],))))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for column, name in ((found.chosen, "chosen"), (found.rejected, "rejected")):
        talk = [*GOOD["prompt"], {"role": "assistant", "content": GOOD[name]}]
        expected = tokenizer.apply_chat_template(talk, return_dict=False)
        assert [column[i].tolist() for i in range(len(column))] == [expected, expected]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{source}: left out 4 of 6 rows, the first: {source}:2: 13")


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        ([GOOD, LONG], 0.0, r"data.jsonl:2: 1\d\d tokens, but the model takes 128; shorten the row"),
        ([GOOD, SAME], 0.0, r"data.jsonl:2: 'chosen' and 'rejected' are the same to the model's tokenizer"),
        ([SAME, GOOD, LONG, EQUAL], 0.5, r"data.jsonl:4: 'chosen' and 'rejected' are the same response"),
        ([EQUAL, GOOD, GOOD, LONG], 0.49, r"data.jsonl:4: 1\d\d tokens"),
    ],
)
def test_more_than_the_share_is_an_error_that_names_a_row(write, folder, rows, share, message):
    with pytest.raises(ValueError, match=message):
        preference_tokens(KEY, None, folder, write(*rows), share)


def test_what_a_template_refuses_names_the_row(write, policy_folder):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    template += "{{ m.content }} {% endfor %}"
    made = config(f"policy.init_from={policy_folder}")
    made.policy.chat_template = template
    talk = [{"role": "user", "content": "tea ?"}, {"role": "assistant", "content": "yes"}]
    source = write({"messages": talk}, {"messages": [{"role": "system", "content": "good"}, *talk]})
    with pytest.raises(ValueError, match=r"data.jsonl:2: policy: the chat template failed \(no system\)"):
        demonstration_tokens(made, str(policy_folder), source)

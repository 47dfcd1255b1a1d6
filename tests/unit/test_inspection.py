"""A batch that could not be learnt, as it is left for inspection."""

import json

import numpy as np

from rlhf.learn.inspection import save_batch
from tests.ranks import MANY, experiences


def test_a_batch_is_read_back_without_pickle(tmp_path):
    batch = experiences(MANY)
    batch[1].rewards.combined[0] = np.nan
    save_batch(tmp_path / "new" / "batch-7.npz", batch)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["batch-7.npz"]
    with np.load(tmp_path / "new" / "batch-7.npz", allow_pickle=False) as file:
        text = json.loads(str(file["text"]))
        found = {name: file[name] for name in file.files}
    assert text == {"prompts": [""] * 3, "responses": [""] * 6, "models": ["a", "b"]}
    row = 0
    for item, experience in enumerate(batch):
        rollouts, rewards = experience.rollouts, experience.rewards
        start = found["prompt_offsets"][item : item + 2]
        np.testing.assert_array_equal(found["prompt_tokens"][slice(*start)], rollouts.prompt_tokens[0])
        for n in range(rollouts.responses):
            span = slice(*found["offsets"][row : row + 2])
            own = slice(*rollouts.tokens.offsets[n : n + 2])
            np.testing.assert_array_equal(found["tokens"][span], rollouts.tokens[n])
            np.testing.assert_array_equal(found["logprobs"][span], rollouts.logprobs[own])
            np.testing.assert_array_equal(found["raw"][row], rewards.raw[n])
            np.testing.assert_array_equal(found["combined"][row], rewards.combined[n])
            assert found["group"][row] == item
            assert found["place"][row].tolist() == [item, n]
            row += 1
    assert row == len(found["combined"])

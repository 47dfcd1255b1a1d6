from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import save_policy

    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def reward_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tiny import save_reward_model

    folder = tmp_path_factory.mktemp("rewards")
    return {
        name: save_reward_model(folder / name, seed) for seed, name in enumerate(("helpful", "harmless"), 1)
    }

"""cluster.yaml passes Ray's own offline validation and agrees with constraints.txt."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def images(config: dict[str, Any]) -> list[str]:
    of_nodes = [
        node.get("docker", {}).get("worker_image") for node in config["available_node_types"].values()
    ]
    return [image for image in [config["docker"]["image"], *of_nodes] if image]


def test_ray_accepts_it() -> None:
    config = prepare_config(cluster())
    validate_config(config)
    nodes = config["available_node_types"]
    assert config["head_node_type"] in nodes
    workers = [node for name, node in nodes.items() if name != config["head_node_type"]]
    assert sum(node["min_workers"] for node in workers) <= config["max_workers"]
    assert all(node["min_workers"] <= node["max_workers"] for node in workers)


def test_ray_refuses_an_unknown_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(cluster() | {"max_wrokers": 3}))


def test_images_hold_the_pinned_ray_and_a_supported_python() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    for image in images(cluster()):
        assert re.fullmatch(rf"rayproject/ray:{re.escape(pinned[1])}-py311-(cpu|gpu)", image), image


def test_nodes_install_what_the_checkout_mounts() -> None:
    config = cluster()
    (remote,) = (there for there, here in config["file_mounts"].items() if here == ".")
    commands = config["setup_commands"]
    assert all(command.startswith(f"cd {remote} && pip install -c constraints.txt ") for command in commands)
    assert commands[0].endswith(" torch"), "torch goes in first"


def test_nodes_ask_for_a_token_that_the_file_does_not_hold() -> None:
    config = cluster()
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ray start ") for command in starts)
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in (ROOT / "cluster.yaml").read_text()

"""Pushing to the hub: with huggingface_hub's own client, in a process of its own, for it reads its settings once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlhf.config import HubConfig
from rlhf.publish.hub import check_hub
from tests.hub import hub
from tests.tiny import save_policy
from tests.unit.test_layering import ROOT

TOKEN = "hf_" + "Yy8" * 10
CODE = """
import sys
from pathlib import Path
from rlhf.config import HubConfig
from rlhf.publish.hub import check_hub, push
settings = HubConfig(sys.argv[2], True, None)
try:
    check_hub(settings, ["report"])
    if sys.argv[1]:
        print(push(Path(sys.argv[1]), settings))
except ValueError as error:
    sys.exit(str(error))
"""


def pushed(tmp_path, url: str, folder="", repo: str = "me/aligned", **changes: str):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_XET": "1"} | changes  # its servers are more than a few endpoints
    return subprocess.run(
        [sys.executable, "-c", CODE, str(folder), repo],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_policy_tokenizer_and_card_arrive(tmp_path):
    folder = save_policy(tmp_path / "policy")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags:\n- rlhf\n---\n\n# It\n")
    (folder / ".README.md.0123").write_text("half")
    with hub(TOKEN) as server:
        done = pushed(tmp_path, server.url, folder, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr + str(server.asked)
        again = pushed(tmp_path, server.url, folder, HF_TOKEN=TOKEN)
        assert again.returncode == 0, again.stderr
    assert done.stdout.strip() == f"{server.url}/me/aligned"
    assert server.repos == {"me/aligned": True}
    here = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del here[".README.md.0123"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "adapter/adapter_config.json"} <= set(here)
    assert server.files == here
    assert TOKEN not in done.stdout + done.stderr + " ".join(server.asked)


def test_what_cannot_be_pushed_is_refused_before_the_run(tmp_path):
    with hub(TOKEN) as server:
        none = pushed(tmp_path, server.url)
        wrong = pushed(tmp_path, server.url, HF_TOKEN=TOKEN + "x")
        offline = pushed(tmp_path, server.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
        name = pushed(tmp_path, server.url, repo="me/no/name", HF_TOKEN=TOKEN)
        bare = pushed(tmp_path, server.url, repo="aligned", HF_TOKEN=TOKEN)
        assert server.asked == ["GET /api/whoami-v2"]
        other = pushed(tmp_path, server.url, repo="you/aligned", HF_TOKEN=TOKEN)
        ours = pushed(tmp_path, server.url, repo="us/aligned", HF_TOKEN=TOKEN)
        server.role = "read"
        reads = pushed(tmp_path, server.url, HF_TOKEN=TOKEN)
    away = pushed(tmp_path, "http://127.0.0.1:9", HF_TOKEN=TOKEN)
    key = "hub.repo=me/aligned"
    advice = "set HF_TOKEN, or call hf auth login"
    assert none.stderr.strip() == f"{key} needs a token: {advice}"
    assert wrong.stderr.strip() == f"{key}: the token is not accepted: {advice}"
    assert offline.stderr.strip().startswith(
        f"{key} cannot be pushed to, for HF_HUB_OFFLINE is set; unset it"
    )
    assert name.stderr.strip().startswith("hub.repo=me/no/name is no name of a repository: Repo id must be")
    assert away.stderr.strip().startswith(f"{key}: http://127.0.0.1:9 cannot be reached (")
    assert bare.stderr.strip() == "hub.repo=aligned must be OWNER/NAME"
    assert other.stderr.strip() == "hub.repo=you/aligned: the token is me's, who is no member of you"
    assert ours.returncode == 0, ours.stderr
    assert reads.stderr.strip() == f"{key}: the token may only read: give one that may write"
    for done in (none, wrong, offline, name, away, bare, other, reads):
        assert done.returncode == 1
        assert "\n" not in done.stderr.strip()


def test_a_push_that_fails_says_what_to_do(tmp_path):
    with hub(TOKEN) as server:
        done = pushed(tmp_path, server.url, tmp_path / "missing", HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert "hub.repo=me/aligned: the policy was not pushed (" in done.stderr
    assert "all else is done, and the same command tries again" in done.stderr


def test_a_push_needs_the_report():
    with pytest.raises(ValueError, match=r"hub.repo=me/it needs the stage report, whose figures"):
        check_hub(HubConfig("me/it", True, None), ["align"])

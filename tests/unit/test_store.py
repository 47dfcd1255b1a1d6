"""Two jobs at once, and folders in which nothing can be written."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.files import link, write_atomic
from rlhf.store import Store, check_writable
from tests.e2e.command import ROOT


def test_of_two_jobs_that_make_the_same_one_does_and_the_other_waits(tmp_path):
    made, begun, said = [], threading.Event(), []

    def make(job: int) -> None:
        def fill(folder):
            begun.set()
            time.sleep(0.3)
            made.append(job)
            (folder / "model").write_text(str(job))

        if job == 1:
            begun.wait(10)
        folder = Store(tmp_path, said.append).make("sft", "0a", fill)
        assert (folder / "model").read_text() == str(made[0])

    with ThreadPoolExecutor(2) as jobs:
        list(jobs.map(make, range(2)))
    assert made == [0]
    (line,) = said
    assert f"process {os.getpid()}" in line
    assert sorted(p.name for p in (tmp_path / "sft" / "0a").iterdir()) == ["checksums.json", "model"]
    assert list((tmp_path / "unfinished" / "sft").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from rlhf.store import Store
def fill(folder):
    (folder / "half").write_text("")
    (folder / ".model.0123").write_text("")
    if sys.argv[2] == "checkpoints":
        (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)
Store(Path(sys.argv[1])).make("sft", "0a", fill)
"""


@pytest.mark.parametrize("left", ["nothing", "checkpoints"])
def test_what_a_killed_process_left_is_cleared_away_unless_one_can_go_on_from_it(tmp_path, left):
    work = tmp_path / "unfinished" / "sft" / "0a"

    def kill():
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), left], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        assert (work / "half").exists()

    kill()
    Store(tmp_path).sweep()
    assert work.exists() == (left == "checkpoints")
    kill()
    found = []
    Store(tmp_path).make(
        "sft", "0a", lambda folder: found.extend(sorted(p.name for p in folder.iterdir() if p.name != "lock"))
    )
    assert found == (["checkpoints", "half"] if left == "checkpoints" else [])
    assert not work.exists()


def test_what_another_process_makes_is_not_swept_away(tmp_path):
    def fill(folder):
        (folder / "half").write_text("")
        Store(tmp_path).sweep()
        assert (folder / "half").exists()

    Store(tmp_path).make("sft", "0a", fill)


@pytest.mark.parametrize("resumable", [False, True])
def test_after_an_error_only_what_one_can_go_on_from_is_left(tmp_path, resumable):
    def fill(folder):
        (folder / "half").write_text("")
        if resumable:
            (folder / "checkpoints" / "step-1").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).make("sft", "0a", fill)
    assert [p.name for p in (tmp_path / "unfinished" / "sft").iterdir()] == ["0a"] * resumable
    assert not (tmp_path / "sft").exists()


def damage(folder, how):
    path = folder / "deep" / "model"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flipped":
        path.write_bytes(b"X" + path.read_bytes()[1:])
    elif how == "missing":
        path.unlink()
    else:
        (folder / "checksums.json").write_text("{")


@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "no checksums"])
def test_a_damaged_folder_is_set_aside_and_made_again(tmp_path, how):
    def fill(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "model").write_text("abc")

    folder = Store(tmp_path).make("sft", "0a", fill)
    assert Store(tmp_path).has("sft", "0a")
    damage(folder, how)
    said = []
    store = Store(tmp_path, said.append)
    assert not store.has("sft", "0a")
    (line,) = said
    assert line.startswith(f"{folder} is damaged (")
    (aside,) = (tmp_path / "damaged" / "sft").iterdir()
    assert str(aside) in line
    store.make("sft", "0a", fill)
    assert store.has("sft", "0a")
    assert (folder / "deep" / "model").read_text() == "abc"


def test_files_and_links_are_replaced_by_many_at_once(tmp_path):
    texts = ["a" * 100_000, "b" * 100_000]
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(lambda i: write_atomic(tmp_path / "f", texts[i % 2]), range(20)))
        list(writers.map(lambda i: link(tmp_path / "latest", tmp_path / f"run{i}"), range(20)))
    assert (tmp_path / "f").read_text() in texts
    assert {p.name for p in tmp_path.iterdir()} == {"f", "latest"}


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/proc/outputs", "No such file or directory"),
        ("{file}", "a file has that name"),
        ("{file}/x", "Not a directory"),
        ("/dev/full/x", "Not a directory"),
        ("~nobody-of-this-name/x", "home"),
        (" ", "is empty"),
    ],
)
def test_a_folder_that_cannot_be_written_names_the_key(tmp_path, folder, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"^output_dir.*{said}"):
        check_writable("output_dir", folder.replace("{file}", str(tmp_path / "file")))

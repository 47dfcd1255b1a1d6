"""Two jobs at once, and folders in which nothing can be written."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.files import link, write_atomic
from rlhf.store import Store, check_writable


def test_of_two_jobs_that_make_the_same_the_first_to_end_stays(tmp_path):
    store, both = Store(tmp_path), threading.Barrier(2)
    ended = []

    def make(job: int) -> None:
        def fill(folder):
            both.wait(10)  # both are making it
            (folder / "model").write_text(str(job))

        folder = store.make("sft", "0a", fill)
        ended.append(job)
        assert (folder / "model").read_text() == str(ended[0])

    with ThreadPoolExecutor(2) as jobs:
        list(jobs.map(make, range(2)))
    assert [p.name for p in (tmp_path / "sft").iterdir()] == ["0a"]


def test_what_was_not_finished_is_not_left(tmp_path):
    def fill(folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).make("sft", "0a", fill)
    assert list((tmp_path / "sft").iterdir()) == []


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

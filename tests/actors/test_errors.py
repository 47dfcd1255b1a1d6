"""Errors of actors in every shape in which Ray delivers them: a user's in one line, with the actor it came from."""

import os
import threading

import pytest
import ray
from ray import serve

from actors.address import check_cluster
from actors.errors import reason, told

pytestmark = pytest.mark.actors


class Locked(ValueError):
    """Cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Two(Exception):
    """Can be pickled, not unpickled."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


class Failing:
    def __init__(self, message: str | None = None) -> None:
        if message is not None:
            raise ValueError(message)

    def value(self, _: object = None) -> None:
        raise ValueError("row 3 is\n  too long")

    def chained(self) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    def lock_within(self) -> None:
        raise ValueError("of two parts", threading.Lock())

    def unpicklable(self) -> None:
        raise Locked("not a plain one")

    def two(self) -> None:
        raise Two(1, 2)

    def encoded(self) -> None:
        b"\xff".decode()

    def full(self) -> None:
        raise OSError(28, "No space left on device", "/disk/model")

    def lost(self) -> None:
        raise KeyError("a fault")

    def asks(self, other: object) -> None:
        ray.get(other.value.remote())

    def leave(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def actors(cluster):
    made = [ray.remote(Failing).options(num_cpus=0).remote() for _ in range(2)]
    yield made
    for actor in made:
        ray.kill(actor)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda a, b: ray.get(a.value.remote()), "row 3 is too long (in Failing.value)"),
        (lambda a, b: ray.get([b.value.remote(), a.value.remote()]), "row 3 is too long (in Failing.value)"),
        (lambda a, b: ray.get(a.asks.remote(b)), "row 3 is too long (in Failing.value)"),
        (lambda a, b: ray.get(a.value.remote(b.chained.remote())), "outer (in Failing.chained)"),
        (lambda a, b: ray.get(a.chained.remote()), "outer (in Failing.chained)"),
        (lambda a, b: ray.get(a.lock_within.remote()), r"('of two parts', <unlocked "),
        (lambda a, b: ray.get(a.encoded.remote()), "'utf-8' codec can't decode byte 0xff in position 0: "),
        (lambda a, b: ray.get(a.full.remote()), "No space left on device: /disk/model (in Failing.full)"),
        (
            lambda a, b: ray.get(ray.remote(Failing).options(num_cpus=0).remote("no model").value.remote()),
            "no model (in Failing.__init__)",
        ),
    ],
)
def test_a_users_error_is_one_line_with_its_actor(actors, call, line):
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever Ray makes of it
        call(*actors)
    found = reason(raised.value)
    assert found is not None
    assert found.startswith(line)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda a: a.lost.remote(), "error: KeyError: 'a fault' (in Failing.lost)"),
        (lambda a: a.two.remote(), "Two: 1 2 (in Failing.two)"),
        (
            lambda a: a.unpicklable.remote(),
            "Locked: not a plain one (in Failing.unpicklable)",
        ),
    ],
)
def test_a_fault_keeps_its_traceback(actors, capsys, call, line):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        ray.get(call(actors[0]))
    assert reason(raised.value) is None
    assert told(raised.value).endswith(line)
    assert "Traceback" in capsys.readouterr().err


def test_a_dead_process_is_no_fault_of_the_code(cluster):
    actor = ray.remote(Failing).options(num_cpus=0).remote()
    with pytest.raises(ray.exceptions.RayActorError) as raised:
        ray.get(actor.leave.remote())
    assert reason(raised.value).startswith("The actor died unexpectedly")
    assert "class_name: Failing" in reason(raised.value)


def test_an_error_behind_serve_names_the_deployment(cluster):
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    app = serve.deployment(Failing).options(name="reward-kind", ray_actor_options={"num_cpus": 0}).bind()
    handle = serve.run(app, name="failing", route_prefix=None, logging_config={"log_level": "ERROR"})
    try:
        with pytest.raises(ValueError, match="too long") as raised:
            ray.get(handle.value.remote()._to_object_ref_sync())
    finally:
        serve.delete("failing")
    assert reason(raised.value) == "row 3 is too long (in reward-kind)"


def test_a_running_cluster_is_no_error(cluster):
    check_cluster("RAY_ADDRESS", ray.get_runtime_context().gcs_address)

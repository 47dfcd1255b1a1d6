"""Which cluster is meant, and what is said where there is none; where Ray keeps its files."""

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from actors import cluster
from actors.address import check_cluster, check_form, given_address
from tests.unit.test_config import config


@pytest.mark.parametrize(
    ("address", "environment", "given"),
    [
        ("null", "", None),
        ("null", "a:1", ("RAY_ADDRESS", "a:1")),
        ("'b:2'", "a:1", ("resources.address", "b:2")),
        ("auto", "a:1", ("RAY_ADDRESS", "a:1")),
        ("auto", "", ("resources.address", "auto")),
        ("local", "a:1", None),
    ],
)
def test_the_configurations_address_wins_but_for_auto(monkeypatch, address, environment, given):
    monkeypatch.setenv("RAY_ADDRESS", environment)
    assert given_address(config(f"resources.address={address}").resources) == given


def test_forms_of_addresses():
    assert check_form("k", "head:6379") == ("head", 6379)
    assert check_form("k", "[::1]:6379") == ("::1", 6379)
    assert check_form("k", "auto") is None
    with pytest.raises(ValueError, match=r"k=http://h:8265 is where jobs are submitted"):
        check_form("k", "http://h:8265")
    for wrong in ("head", "head:", ":6379", "head:99999", "ray://head:10001"):
        with pytest.raises(ValueError, match=rf"k={wrong} is no HOST:PORT"):
            check_form("k", wrong)


def test_nobody_answers():
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"RAY_ADDRESS=127.0.0.1:{port}: no Ray cluster answers there \(Conn"
        ):
            check_cluster("RAY_ADDRESS", f"127.0.0.1:{port}")


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """What a cluster's head answers."""

    def __init__(self, version: str | None) -> None:
        self._version = version

    def CheckAlive(self, request, context):  # Ray names it so
        if self._version is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return gcs_service_pb2.CheckAliveReply(ray_version=self._version)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head("1.0.0"), r"the cluster has Ray 1.0.0, this process \d"),
        (Head(None), r"refuses this process \(no token\); set RAY_AUTH_MODE=token"),
        (None, r"what answers there is no head of a Ray cluster \(UNIMPLEMENTED\)"),
    ],
)
def test_another_version_a_token_or_another_service(head, message):
    server = grpc.server(ThreadPoolExecutor(1))
    if head is not None:
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(head, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ValueError, match=rf"resources.address=127.0.0.1:{port}: .*{message}"):
            check_cluster("resources.address", f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_a_long_or_read_only_folder_for_temporary_files_is_left(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert cluster.folder() is None
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    assert cluster.folder() == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "/proc")
    assert cluster.folder() == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert cluster.folder() is None


def test_the_longest_path_of_a_socket_is_rays(tmp_path):
    """The room that is left for it must be what Ray takes, or a path is refused late."""
    from ray._private.utils import validate_socket_filepath

    room = cluster.SOCKET - len(f"/{cluster.IN_FOLDER}")
    validate_socket_filepath(f"/{'x' * (room - 1)}/{cluster.IN_FOLDER}")
    with pytest.raises(OSError, match="cannot exceed"):
        validate_socket_filepath(f"/{'x' * room}/{cluster.IN_FOLDER}")

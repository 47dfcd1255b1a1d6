"""The address of a Ray cluster: which one is meant, and whether there is a cluster that this process can join."""

from __future__ import annotations

import os
import socket

from rlhf.config import ResourcesConfig

PATIENCE = 10.0  # seconds for an answer


def given_address(resources: ResourcesConfig) -> tuple[str, str] | None:
    """(key, address) of the cluster that is asked for; None: Ray is started here. An address wins over RAY_ADDRESS, but
    for `auto`, which a submitted job's RAY_ADDRESS makes precise."""
    there = os.environ.get("RAY_ADDRESS") or None
    key, address = "resources.address", resources.address
    if there is not None and address in (None, "", "auto"):
        key, address = "RAY_ADDRESS", there
    return (key, address) if address not in (None, "", "local") else None


def check_form(key: str, address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for `auto`.

    Raises:
        ValueError: it is of another service than a cluster's head, or of none.
    """
    if address == "auto":
        return None
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ValueError(
            f"{key}={address} is where jobs are submitted: ray job submit --address {address} --working-dir . -- "
            "python -m rlhf ...; a running command takes HOST:PORT of the cluster's head"
        )
    host, _, port = rest.rpartition(":")
    if scheme or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"{key}={address} is no HOST:PORT of a cluster's head (as ray start --head says it), nor auto"
            + ("; Ray Client (ray://) is not supported: submit a job" if scheme == "ray" else "")
        )
    return host.strip("[]"), int(port)


def check_cluster(key: str, address: str) -> None:
    """Asks the head whether it is one, of this version. (`ray.init` would ask for minutes, and print each try.)

    Raises:
        ValueError: nobody answers, or not as a head of this version; no node of the cluster is here.
    """
    import ray
    from ray._private import services

    place = check_form(key, address)
    if place is None:
        try:
            found = services.canonicalize_bootstrap_address_or_die(address)
        except ConnectionError as error:  # none, or several
            raise ValueError(f"{key}={address}: {error}") from None
        place = check_form(key, found)
        assert place is not None
        address = f"{address} ({found})"
    what = f"{key}={address}"
    try:
        socket.create_connection(place, PATIENCE).close()
    except OSError as error:
        raise ValueError(
            f"{what}: no Ray cluster answers there ({error.strerror or error}); start it, correct the address, or "
            f"leave {key} away to run on this machine"
        ) from None
    version = _version(what, place)
    if version != ray.__version__:
        raise ValueError(
            f"{what}: the cluster has Ray {version}, this process {ray.__version__}; install the same"
        )
    if not services.find_node_ids():
        raise ValueError(
            f"{what}: no node of the cluster runs on this machine; submit a job (ray job submit), or join the cluster "
            "first (ray start --address)"
        )


def _version(what: str, place: tuple[str, int]) -> str:
    """Ray's version of the head."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    host, port = place
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # a proxy for the world outside is none for the cluster
    with init_grpc_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
        try:
            return str(ask(gcs_service_pb2.CheckAliveRequest(), timeout=PATIENCE).ray_version)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise ValueError(
                    f"{what}: the cluster refuses this process ({error.details()}); set RAY_AUTH_MODE=token and "
                    "RAY_AUTH_TOKEN as the cluster has them"
                ) from None
            raise ValueError(
                f"{what}: what answers there is no head of a Ray cluster ({error.code().name}); the port is the one "
                "that ray start --head says, 6379 unless it was given another"
            ) from None

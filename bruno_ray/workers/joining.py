"""Whether an address leads to a Ray cluster, before Ray is told to join it: of one that is gone Ray says nothing for
more than six minutes."""

import os
import re
import socket

from bruno_ray.errors import SettingsError, first_line
from bruno_ray.settings import RaySettings

CONNECT_S = 5.0
"""For a machine to take a connection, which its kernel does, however busy it is."""

ANSWER_S = 20.0
"""For Ray to answer on it, on a busy machine."""

ADDRESS = re.compile(r"(?:ray://)?(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:/\s\[\]]+)):(?P<port>\d+)")


def cluster_address(settings: RaySettings) -> str | None:
    """Of the cluster to join; None for a local one."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def no_cluster(settings: RaySettings, reason: str) -> SettingsError:
    """What is said when there is no cluster at the address that is set."""
    where = "ray.address" if settings.address else "RAY_ADDRESS (unset, it leaves Ray to be started here)"
    return SettingsError(
        f"no Ray cluster at {cluster_address(settings)} ({reason}): check {where}, start it first, or set"
        " RAY_AUTH_MODE=token if it asks for a token"
    )


def require_cluster(settings: RaySettings) -> None:
    """Raises SettingsError within seconds if nobody takes a connection at the address, or if it is not Ray who does."""
    address = cluster_address(settings)
    if address is None or address == "auto":
        return
    match = ADDRESS.fullmatch(address)
    if match is None:
        where = "ray.address" if settings.address else "RAY_ADDRESS"
        kind = "is the address of Ray's job server or dashboard" if address.startswith("http") else "is no address"
        raise SettingsError(
            f"{where} = {address} {kind}: give HOST:PORT of the cluster's head, whose port is usually 6379, or auto;"
            " for a cluster of your own on this machine, local"
        )
    try:
        with socket.create_connection((match["six"] or match["host"], int(match["port"])), timeout=CONNECT_S):
            pass
    except (OSError, OverflowError) as error:  # no such host, nothing listens, no answer; no such port
        raise no_cluster(settings, getattr(error, "strerror", None) or first_line(error)) from error
    if not address.startswith("ray://") and not os.environ.get("RAY_USE_TLS"):
        _require_grpc(settings, address)


def _require_grpc(settings: RaySettings, address: str) -> None:
    """What listens there speaks gRPC, as a cluster's head does, and no dashboard."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise no_cluster(settings, "something else listens there") from error

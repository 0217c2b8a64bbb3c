"""Whether an address leads to a Ray cluster, before Ray is told to join it: of one that is gone Ray says nothing for
more than six minutes."""

import os
import re
import socket

from bruno_ray.errors import SettingsError, first_line
from bruno_ray.settings import RaySettings

PATIENCE_S = 4.0
"""For a machine to take a connection, and again for Ray to answer on it."""

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
    """Raises SettingsError within some seconds if nothing, or something else than Ray, answers at the address."""
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
        with socket.create_connection((match["six"] or match["host"], int(match["port"])), timeout=PATIENCE_S):
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
            grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
        except grpc.FutureTimeoutError as error:
            raise no_cluster(settings, "something else listens there") from error

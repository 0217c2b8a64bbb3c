"""`bruno-ray serve`: start or join Ray, serve until Ctrl-C, leave nothing behind."""

import argparse
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from bruno_ray.cli.command import Command
from bruno_ray.cli.exits import exit_code
from bruno_ray.errors import SERVER_FAILED, SettingsError
from bruno_ray.ray_internals import serve_address
from serve.api.auth import VARIABLE, hash_of, known_hashes, make_key
from serve.arguments import add_arguments, is_loopback, joins, serve_args
from serve.settings import ServeArgs

if TYPE_CHECKING:
    from serve.catalog.catalog import Catalog

logger = logging.getLogger(__name__)

APPLICATION = "bruno-ray"
OWN_CLUSTER = {
    # Two threads less that every request and every piece of an answer go through. What takes long does so in threads
    # of its own, but for the loading of a model, when there is nothing to pass on yet.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_worker_niceness": "0",  # by default replicas give way to whatever else runs, and readers of streams see it
}
"""Environment of a cluster that is for serving alone."""

PAGE_PACKAGES = ("gradio", "optuna_dashboard")
"""Import names; looked for without importing them, which takes seconds."""

DESCRIPTION = "Serve runs and saved models behind an OpenAI-compatible API, with a chat page."


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM. Raises SettingsError if there is nothing to serve, before Ray is started."""
    hashes = known_hashes(arguments.keys_file)
    args = serve_args(arguments, key_known=bool(hashes))
    require_packages(args)
    from serve.catalog.catalog import discovered  # reads studies, for which it imports optuna: not for `--help`

    catalog = discovered(args)
    made_key = make_key() if args.require_key and not hashes else None
    if made_key:
        hashes = (hash_of(made_key),)
    if not joins(arguments):
        refuse_used_port(arguments.host, arguments.port)
    with stop_signal() as stopped, ray_for(args, arguments, len(catalog.engines)):
        from ray import serve

        from serve.app import application

        joined = joins(arguments)
        host, port = start_serve(arguments.host, arguments.port, with_proxy=joined)
        if not joined:
            args = args.model_copy(update={"listen": address_of(host, port), "route_prefix": arguments.route_prefix})
        refuse_second()
        if not (args.require_key or arguments.no_key or is_loopback(host)):
            raise SettingsError(
                f"Serve listens on {host} on that cluster, where others can connect: set {VARIABLE}, or give"
                " --keys-file or --no-key"
            )
        print(f"loading {', '.join(catalog.engines)} ...", flush=True)
        try:
            deploy(application(args, catalog, hashes), arguments.route_prefix, stopped)
            if not stopped.is_set():
                url = url_of(host, port, arguments.route_prefix)
                print("\n".join(announcement(args, url, catalog, made_key)), flush=True)
            stopped.wait()
            print("stopping", flush=True)
        finally:
            if joins(arguments):  # our own cluster goes as a whole
                serve.delete(APPLICATION)


def require_packages(args: ServeArgs) -> None:
    """Raises SettingsError if the packages of the pages are not installed: they come with an extra."""
    missing = [package for package in PAGE_PACKAGES if not _is_installed(package)]
    if args.pages and missing:
        raise SettingsError(
            f"the pages need {' and '.join(missing)}: pip install 'bruno-ray[serve]', or serve the API alone with"
            " --no-pages"
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # None in sys.modules
        return False


def start_serve(host: str, port: int, with_proxy: bool) -> tuple[str, int]:
    """Where it listens: as asked for, or, on a cluster that serves something already, as it was started there.

    Without Serve's proxy nothing listens yet: the API will.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    serve.start(
        proxy_location="HeadOnly" if with_proxy else "Disabled",
        http_options={"host": host, "port": port},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return serve_address() if with_proxy else (host, port)


def refuse_second() -> None:
    """Raises SettingsError if this would take the place of what somebody else serves on the cluster."""
    from ray import serve

    if APPLICATION in serve.status().applications:
        raise SettingsError(
            f"the cluster serves an application called {APPLICATION} already: stop that one first, or serve this"
            " together with it, from its config.yaml"
        )


def deploy(application, route_prefix: str, stopped: threading.Event) -> None:
    """Returns when everything runs, or when we are to stop. Raises SettingsError if it cannot."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus, LoggingConfig

    # Unlike `run`, this can be told not to wait, and so be stopped.
    target = serve.RunTarget(
        application, APPLICATION, route_prefix, logging_config=LoggingConfig(enable_access_log=False)
    )
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while not stopped.wait(0.2):
        status = serve.status().applications.get(APPLICATION)
        if status is None or status.status in (ApplicationStatus.DEPLOYING, ApplicationStatus.NOT_STARTED):
            continue
        if status.status == ApplicationStatus.RUNNING:
            return
        reasons = [d.message for d in status.deployments.values() if d.message] or [status.message]
        raise SettingsError(SERVER_FAILED + reason_of(reasons[0]))


def reason_of(message: str) -> str:
    """What a replica died of, on one line: Ray gives its whole traceback, which ends with that."""
    lines = message.strip().splitlines()
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
    return " ".join(" ".join(lines[errors[-1] if errors else 0 :]).split())[-500:]


def url_of(host: str, port: int, route_prefix: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{address_of(host, port)}{route_prefix.rstrip('/')}"


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announcement(args: ServeArgs, url: str, catalog: "Catalog", made_key: str | None) -> Iterator[str]:
    """What is printed once everything runs."""
    yield f"API:       {url}/v1"
    if args.pages:
        yield f"chat page: {url}/chat/"
        yield from (f"study:     {url}/study/{name}/" for name in catalog.runs)
    if made_key:
        yield f"key:       {made_key}   (shown only now; a key of your own: {VARIABLE}, or --keys-file)"
    else:
        yield f"key:       {'as you gave it' if args.require_key else 'none is needed'}"
    yield "models:"
    yield from (f"  {entry.id:<40} {entry.description}" for entry in catalog.entries)
    yield from (f"  {problem.id:<40} not served: {problem.reason}" for problem in catalog.problems)
    yield "Ctrl-C stops the server."


def refuse_used_port(host: str, port: int) -> None:
    """Raises SettingsError if nobody can listen there. Ray would say so in a log file only."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): choose another --port or --host"
        ) from error


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that is set by SIGINT or SIGTERM; nothing is interrupted half-way."""
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_for(args: ServeArgs, arguments: argparse.Namespace, n_engines: int) -> Iterator[None]:
    """A cluster to serve on: joined, and left with nothing of ours running, or of our own."""
    from bruno_ray.settings import RaySettings
    from bruno_ray.workers.session import ray_session

    settings = RaySettings(
        address=arguments.address,
        workers=n_engines * args.max_replicas,
        cpus_per_worker=args.cpus_per_replica,
        **({"object_store_memory": arguments.object_store_memory} if arguments.object_store_memory else {}),
    )
    if not joins(arguments):
        for name, value in OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
    with ray_session(settings):
        try:
            yield
        finally:
            from ray import serve

            if joins(arguments) and not serve.status().applications:
                serve.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m serve.command`: the same as `bruno-ray serve`."""
    parser = argparse.ArgumentParser(prog="bruno-ray serve", description=DESCRIPTION)
    add_arguments(parser)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return exit_code(lambda: run(parser.parse_args(argv)))


COMMAND = Command(DESCRIPTION, run, add_arguments)
"""`bruno-ray serve`, an entry point of pyproject.toml."""


if __name__ == "__main__":
    raise SystemExit(main())

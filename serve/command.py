"""`bruno-ray serve`: start or join Ray, serve until Ctrl-C, leave nothing behind."""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bruno_ray.errors import BrunoError, SettingsError
from serve.auth import VARIABLE, hash_of, known_hashes, make_key
from serve.catalog import Catalog, discovered
from serve.settings import EngineSettings, ServeArgs

log = logging.getLogger(__name__)

APPLICATION = "bruno-ray"
DESCRIPTION = "Serve runs and saved models behind an OpenAI-compatible API, with a chat page."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bruno-ray serve`; give what argparse makes of them to ``run``."""
    defaults, engine = ServeArgs(), EngineSettings()
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run directory, or its name below the output directory")
    parser.add_argument(
        "--model",
        metavar="PATH",
        dest="models",
        action="append",
        default=[],
        help="saved model, a folder that holds several, or a Hugging Face id; may be repeated",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only]")
    where.add_argument("--port", type=int, default=8000, metavar="N", help="[8000]")
    where.add_argument("--route-prefix", default="/", metavar="PATH", help="path that everything is below [/]")
    where.add_argument(
        "--output-directory",
        type=Path,
        default=defaults.output_directory,
        metavar="FOLDER",
        help="where runs are looked for by name [runs]",
    )
    where.add_argument("--address", metavar="ADDRESS", help="Ray cluster to join [RAY_ADDRESS, or a local one]")
    who = parser.add_argument_group("who")
    who.add_argument(
        "--keys-file",
        type=Path,
        metavar="FILE",
        help=f"keys, a sha256 a line; {VARIABLE} in the environment is one more key",
    )
    who.add_argument("--no-key", action="store_true", help="let everyone in who can connect")
    who.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        default=[],
        metavar="URL",
        help="web page that may use the API from a browser; may be repeated",
    )
    size = parser.add_argument_group("how much")
    size.add_argument(
        "--quantization",
        default=defaults.quantization,
        choices=("none", "bnb_4bit", "bnb_8bit"),
        help="of --model; a run's base is loaded as its search did [none]",
    )
    size.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of each base model [1]")
    size.add_argument("--max-replicas", type=int, default=None, metavar="N", help="more of them when busy [--replicas]")
    size.add_argument("--gpus-per-replica", type=float, default=None, metavar="X", help="[1 if there is one, else 0]")
    size.add_argument("--cpus-per-replica", type=float, default=1.0, metavar="X", help="also torch's threads [1]")
    size.add_argument(
        "--max-rows",
        type=int,
        default=engine.max_rows,
        metavar="N",
        help=f"answers a copy generates at the same time [{engine.max_rows}]",
    )
    size.add_argument(
        "--max-waiting",
        type=int,
        default=engine.max_waiting,
        metavar="N",
        help=f"requests beyond those [{engine.max_waiting}]",
    )
    size.add_argument(
        "--max-context", type=int, default=0, metavar="N", help="tokens of prompt and answer [the model's]"
    )
    size.add_argument(
        "--kv-tokens",
        type=int,
        default=0,
        metavar="N",
        help="room for keys and values, in tokens [from the free memory]",
    )
    size.add_argument(
        "--request-timeout",
        type=float,
        default=defaults.request_timeout_s,
        metavar="SECONDS",
        help=f"longest time for one request [{defaults.request_timeout_s:g}]",
    )
    size.add_argument(
        "--object-store-memory", type=int, default=None, metavar="BYTES", help="of a local Ray cluster [256 MiB]"
    )
    parser.add_argument("--no-pages", action="store_true", help="only the API")  # fmt: skip


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_args(arguments: argparse.Namespace, key_known: bool) -> ServeArgs:
    """A key is asked for where others can connect, and wherever one was given."""
    if arguments.no_key and arguments.keys_file:
        raise SettingsError("command line: --no-key and --keys-file contradict each other: leave one out")
    if not 1 <= arguments.port <= 65535:
        raise SettingsError(f"command line: --port {arguments.port} is not a port: give one from 1 to 65535")
    if not arguments.route_prefix.startswith("/") or (
        arguments.route_prefix.endswith("/") and arguments.route_prefix != "/"
    ):
        raise SettingsError(f"command line: --route-prefix {arguments.route_prefix} must look like /path")
    max_replicas = arguments.max_replicas or arguments.replicas
    if not 1 <= arguments.replicas <= max_replicas:
        raise SettingsError("command line: --replicas must be at least 1 and at most --max-replicas")
    for name in ("max_rows", "max_waiting", "cpus_per_replica", "request_timeout"):
        if getattr(arguments, name) <= 0:
            raise SettingsError(f"command line: --{name.replace('_', '-')} must be above 0")
    return ServeArgs(
        runs=tuple(arguments.runs),
        models=tuple(arguments.models),
        output_directory=arguments.output_directory,
        quantization=arguments.quantization,
        require_key=not arguments.no_key and (key_known or not is_loopback(arguments.host)),
        keys_file=arguments.keys_file,
        cors_origins=tuple(arguments.cors_origins),
        request_timeout_s=arguments.request_timeout,
        min_replicas=arguments.replicas,
        max_replicas=max_replicas,
        gpus_per_replica=arguments.gpus_per_replica,
        cpus_per_replica=arguments.cpus_per_replica,
        engine=EngineSettings(
            max_rows=arguments.max_rows,
            max_waiting=arguments.max_waiting,
            kv_tokens=arguments.kv_tokens,
            max_context=arguments.max_context,
        ),
        pages=not arguments.no_pages,
    )


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM. Raises SettingsError if there is nothing to serve, before Ray is started."""
    hashes = known_hashes(arguments.keys_file)
    args = serve_args(arguments, key_known=bool(hashes))
    catalog = discovered(args)
    made_key = make_key() if args.require_key and not hashes else None
    if made_key:
        hashes = (hash_of(made_key),)
    if not joins(arguments):
        refuse_used_port(arguments.host, arguments.port)
    with stop_signal() as stopped, ray_for(args, arguments, len(catalog.engines)):
        from ray import serve

        from serve.app import application

        host, port = start_serve(arguments.host, arguments.port)
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


def joins(arguments: argparse.Namespace) -> bool:
    """Whether a cluster that is there is joined, not one of our own started."""
    return (arguments.address or os.environ.get("RAY_ADDRESS") or "local") != "local"


def start_serve(host: str, port: int) -> tuple[str, int]:
    """Where it listens: as asked for, or, on a cluster that serves something already, as it was started there."""
    from ray import serve
    from ray.serve.context import _get_global_client  # says what is; Serve's public functions do not
    from ray.serve.schema import LoggingConfig

    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    options = _get_global_client().http_config
    return options.host, options.port


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
        raise SettingsError(f"the server could not be started: {' '.join(reasons[0].split())[-500:]}")


def url_of(host: str, port: int, route_prefix: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{route_prefix.rstrip('/')}"


def announcement(args: ServeArgs, url: str, catalog: Catalog, made_key: str | None) -> Iterator[str]:
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
    from bruno_ray.pool import ray_session
    from bruno_ray.settings import RaySettings

    settings = RaySettings(
        address=arguments.address,
        workers=n_engines * args.max_replicas,
        cpus_per_worker=args.cpus_per_replica,
        **({"object_store_memory": arguments.object_store_memory} if arguments.object_store_memory else {}),
    )
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
    try:
        run(parser.parse_args(argv))
    except BrunoError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The arguments of `bruno-ray serve`, and the settings they make. Imports nothing heavy: every command reads this."""

import argparse
import ipaddress
import os
from pathlib import Path

from bruno_ray.errors import SettingsError
from bruno_ray.runs.lookup import is_path, output_directory
from bruno_ray.settings.schema import SMALLEST_STORE
from serve.api.auth import VARIABLE
from serve.settings import EngineSettings, ServeArgs


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
    where.add_argument("--route-prefix", default="/", metavar="PATH", help="path that all routes start with [/]")
    where.add_argument(
        "--output-directory",
        type=Path,
        metavar="FOLDER",
        help="folder in which runs are looked up by name [output.directory of the settings]",
    )
    where.add_argument("--address", metavar="ADDRESS", help="Ray cluster to join [RAY_ADDRESS, or a local one]")
    who = parser.add_argument_group("who")
    who.add_argument(
        "--keys-file",
        type=Path,
        metavar="FILE",
        help=f"keys, a sha256 a line; {VARIABLE} in the environment is one more key",
    )
    who.add_argument("--no-key", action="store_true", help="require no key: anyone who can connect may use it")
    who.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        metavar="URL",
        help="web page that may use the API from a browser; may be repeated [local: pages of this machine]",
    )
    size = parser.add_argument_group("how much")
    size.add_argument(
        "--quantization",
        default=defaults.quantization,
        choices=("none", "bnb_4bit", "bnb_8bit"),
        help="for --model; a run's base is loaded as in its search [none]",
    )
    size.add_argument(
        "--lean-forward",
        default=defaults.lean_forward,
        choices=("auto", "off"),
        help="off: always transformers' own forward pass [auto]",
    )
    size.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of each base model [1]")
    size.add_argument(
        "--max-replicas", type=int, default=None, metavar="N", help="up to this many when busy [--replicas]"
    )
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
    defaults = ServeArgs()
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
    if arguments.object_store_memory is not None and arguments.object_store_memory < SMALLEST_STORE:
        raise SettingsError(f"command line: --object-store-memory must be at least {SMALLEST_STORE}: Ray takes no less")
    directory = arguments.output_directory
    if directory is None:
        by_name = not all(map(is_path, arguments.runs))
        directory = output_directory() if by_name else defaults.output_directory
    return ServeArgs(
        runs=tuple(arguments.runs),
        models=tuple(arguments.models),
        output_directory=directory,
        quantization=arguments.quantization,
        lean_forward=arguments.lean_forward,
        require_key=not arguments.no_key and (key_known or not is_loopback(arguments.host)),
        keys_file=arguments.keys_file,
        cors_origins=defaults.cors_origins if arguments.cors_origins is None else tuple(arguments.cors_origins),
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


def joins(arguments: argparse.Namespace) -> bool:
    """Whether a cluster that is there is joined, not one of our own started."""
    return (arguments.address or os.environ.get("RAY_ADDRESS") or "local") != "local"

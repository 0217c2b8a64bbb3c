"""Entry point of `bruno-ray`: parses arguments and calls the command's function, which imports what it needs.

Settings appear as flags generated from the schema, so that a setting has its flag, documentation and default the
moment it is written there. Every BrunoError becomes one line and exit code 2; Ctrl-C exits with 130.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bruno_ray.cli.beginning import process_began
from bruno_ray.cli.exits import exit_code
from bruno_ray.cli.parser import parse
from bruno_ray.progress import listen


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    began = process_began() if argv is None else time.perf_counter()
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else list(argv), began))


def _run(argv: Sequence[str], began: float) -> int | None:
    """``began`` is when the command began; commands that note where their time goes count from there."""
    arguments = parse(argv)
    arguments.began = began
    _prepare_logging(arguments)
    _require_home()
    # Threads that wait must not spin: on a busy machine that is ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # bars of downloads and weights are for people who watch
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    return arguments.function(arguments)


def _require_home() -> None:
    """A home for a user who has none, neither HOME nor an entry: the root, as containers have it.

    Ray and others look for it when they are imported, and raise. Nothing can be written there; who tries says so.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def _prepare_logging(arguments: argparse.Namespace) -> None:
    """Our own loggers, and those of the package that brings the command, as loud as asked for."""
    level = logging.DEBUG if arguments.verbose else logging.WARNING if arguments.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    listen()
    for package in {"bruno_ray", arguments.function.__module__.partition(".")[0]}:
        logging.getLogger(package).setLevel(level)


if __name__ == "__main__":
    raise SystemExit(main())

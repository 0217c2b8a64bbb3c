"""Every use of names that Ray keeps private, so that an upgrade of Ray breaks in one file.

Each function says what is missing in Ray's public interface and what would replace it. ``tests/test_internals.py`` has
a test for each; pyproject.toml bounds Ray above. Ray is imported in the functions: this module costs nothing.
"""

import re
import signal
from typing import Any

AUTOSCALER = "ray.autoscaler.v2.monitor"
"""The module that `ray start --head` runs as the autoscaler's process, given --gcs-address, --autoscaling-config and
--logs-dir. A public command that runs the autoscaler of a cluster elsewhere would replace this."""


def drop_worker_output(pattern: str) -> None:
    """Drop what Ray prints to this driver's stdout wherever a line matches ``pattern``.

    RAY_DEDUP_LOGS_SKIP_REGEX does the same, but is read when ray is imported, which is too late here. A public setter
    would replace this.
    """
    from ray._private.ray_logging import stdout_deduplicator

    stdout_deduplicator.skip_re = re.compile(pattern)


def forget_uv_run() -> None:
    """Start clusters from this process as if it had not been started by ``uv run``.

    Under ``uv run`` Ray packs the working directory for the workers, up to 512 MiB, beyond which it fails.
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 does the same, but is read when ray is imported, which is too late here. An argument
    of ``ray.init`` would replace this.
    """
    from ray._private import ray_constants

    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def stop_tuner() -> None:
    """Make a ``Tuner.fit`` that runs in this thread return soon; nothing happens if none is running.

    Tune installs a handler of SIGUSR1 while it runs, which leaves its loop and cleans up. A public ``Tuner.stop`` would
    replace this.
    """
    if callable(signal.getsignal(signal.SIGUSR1)):
        signal.raise_signal(signal.SIGUSR1)


def serve_address() -> tuple[str, int]:
    """Host and port where Serve's proxy listens, once Serve has been started.

    Serve ignores the options of a second ``serve.start``, and its public functions do not say where the first one
    listens. ``serve.status()`` with the proxies' address would replace this.
    """
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    return options.host, options.port


def ssh_command_runner() -> type[Any]:
    """The class with which the autoscaler runs commands and rsync over ssh, to be extended.

    ``NodeProvider.get_command_runner`` may return one of its own, but Ray offers only the interface, not this
    implementation. A public ``SSHCommandRunner`` would replace this.
    """
    from ray.autoscaler._private.command_runner import SSHCommandRunner

    return SSHCommandRunner

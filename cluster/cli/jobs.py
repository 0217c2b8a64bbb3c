"""Commands about jobs: submit, logs, cancel; and the doors to what runs on the head: dashboard, serve."""

import argparse
import os
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from cluster.cli.asking import agree
from cluster.errors import ClusterSettingsError
from cluster.jobs import submitting, upload
from cluster.jobs.session import Session
from cluster.network.addresses import DASHBOARD_PORT, NodeAddress

SERVE_HINT = "bruno-ray cluster submit --detach -- bruno-ray serve RUN"


def submit(arguments: argparse.Namespace) -> int:
    """Start a job and follow it; the job's exit code, or 0 with --detach."""
    env = dict(variable(pair) for pair in arguments.env)
    excludes = checked_excludes(arguments.working_dir, arguments.exclude, arguments.include)
    session = Session.open(arguments.cluster_config)
    job = submitting.submit(session, arguments.entrypoint, arguments.working_dir, excludes, env)
    print(f"job {job} runs on the head, whatever happens to this machine", flush=True)
    if arguments.detach:
        print(f"follow it with: bruno-ray cluster logs {job}")
        return 0
    return _follow(session, job)


def checked_excludes(folder: Path, more: Sequence[str], included: Sequence[str]) -> list[str]:
    """What does not go along, as patterns; says which secrets of the folder are among it.

    Raises `ClusterSettingsError` where the folder or a file that is to go along does not exist.
    """
    if not folder.is_dir():
        raise ClusterSettingsError(f"--working-dir {folder} is not a folder: give the one with the job's files")
    for name in included:
        if not (folder / name).resolve().is_relative_to(folder.resolve()) or not (folder / name).exists():
            raise ClusterSettingsError(f"command line: --include {name} is not in {folder}: name it relative to that")
    if names := upload.left_out(folder, included):
        print(upload.left_out_line(names), flush=True)
    return upload.excludes(more, included)


def variable(given: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE, or of NAME alone, which is taken from here. Raises `ClusterSettingsError`."""
    name, equals, value = given.partition("=")
    if not equals and name in os.environ:
        return name, os.environ[name]
    if not (name and equals):
        raise ClusterSettingsError(
            f"command line: --env {given} must look like NAME=VALUE, or be the name of a variable that is set here"
        )
    return name, value


def logs(arguments: argparse.Namespace) -> int:
    """Follow a job from the beginning of its output, with its exit code; of an instance its last lines."""
    session = Session.open(arguments.cluster_config)
    if arguments.job is not None and arguments.job.isdecimal():
        text = session.provider.new_client().logs(int(arguments.job), arguments.tail, of_host=arguments.host)
        print(harmless(text), flush=True)
        return 0
    return _follow(session, submitting.find_job(session, arguments.job))


def harmless(text: str) -> str:
    """Without what would steer the terminal: the host of a machine is a stranger."""
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t").rstrip("\n")


def cancel(arguments: argparse.Namespace) -> int:
    """Stop one job; the machines stay until they are idle."""
    session = Session.open(arguments.cluster_config)
    job = submitting.find_job(session, arguments.job)
    agree(f"Stop job {job}? Its run can be resumed.", arguments.yes)
    submitting.stop(session, job)
    print(f"job {job} has ended")
    return 0


def _follow(session: Session, job: str) -> int:
    try:
        return submitting.follow(session, job)
    except KeyboardInterrupt:
        print(f"\njob {job} runs on; follow it with `bruno-ray cluster logs {job}`, stop it with `cluster cancel`")
        raise


def dashboard(arguments: argparse.Namespace) -> int:
    session = Session.open(arguments.cluster_config)
    alias = NodeAddress(0, session.settings.max_cpus).alias
    with session.head_shell().tunnel(alias, DASHBOARD_PORT, arguments.port) as port:
        url = f"http://127.0.0.1:{port}"
        print(f"dashboard: {url}")
        print(f"token:     it asks for one; paste what is in {session.folder / 'auth_token'}")
        _hold_open(url, arguments.open)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """The tunnel to what `bruno-ray serve` serves on the head."""
    import httpx

    session = Session.open(arguments.cluster_config)
    with session.head_shell().tunnel("127.0.0.1", arguments.remote_port, arguments.port) as port:
        url = f"http://127.0.0.1:{port}"
        try:
            answer = httpx.get(f"{url}/v1/models", timeout=10)
            if answer.status_code != 401:  # it asks for a key
                answer.raise_for_status()  # the proxy outlives what it served
        except httpx.HTTPError as error:
            raise ClusterSettingsError(
                f"nothing is served at port {arguments.remote_port} of the head ({error}): start it with `{SERVE_HINT}`"
            ) from error
        print(f"API:       {url}/v1")
        print(f"chat page: {url}/chat/")
        _hold_open(f"{url}/chat/", arguments.open)
    return 0


def _hold_open(url: str, browser: bool) -> None:
    print("Ctrl-C closes the tunnel.", flush=True)
    if browser:
        webbrowser.open(url)
    threading.Event().wait()

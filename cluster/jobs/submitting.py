"""Jobs on the cluster through a tunnel to Ray's job API: submit, follow, find again, stop."""

import asyncio
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from bruno_ray.errors import first_line
from cluster.errors import ClusterError, ClusterSettingsError, JobError, NodeError
from cluster.jobs.session import Session
from cluster.network.addresses import DASHBOARD_PORT, NodeAddress

logger = logging.getLogger(__name__)

RUNS_FOLDER = 'export BRUNO_OUTPUT__DIRECTORY="$HOME/runs"; '
"""A job's own folder is thrown away with it, so runs go to the head's home, where `fetch` finds them."""

POLL_S = 1.0
RECONNECT_S = 3.0
GIVE_UP_S = 600.0
"""How long a connection to the head is tried for again while following a job."""


@contextmanager
def job_client(session: Session) -> Iterator[JobSubmissionClient]:
    """The job API of the head. Raises `NodeError` when it does not answer."""
    alias = NodeAddress(0, session.settings.max_cpus).alias
    with session.head_shell().tunnel(alias, DASHBOARD_PORT) as port:
        try:
            client = JobSubmissionClient(
                f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {session.token()}"}
            )
        except (ConnectionError, RuntimeError) as error:
            raise NodeError(f"the job API does not answer ({first_line(error)}): is Ray up on the head?") from error
        yield client


def entrypoint_of(command: Sequence[str]) -> str:
    """The shell command of a job. A single word with spaces is taken as a shell command already."""
    words = command[1:] if command[:1] == ["--"] else command
    if not words:
        raise ClusterSettingsError(
            "command line: no command; write `bruno-ray cluster submit -- bruno-ray run MODEL ...`"
        )
    return RUNS_FOLDER + (words[0] if len(words) == 1 else shlex.join(words))


def submit(
    session: Session, command: Sequence[str], working_dir: Path, excludes: Sequence[str], env: Mapping[str, str]
) -> str:
    """Start a job on the head; returns its id. ``excludes`` are patterns, as of `upload.excludes`.

    Raises `JobError` when Ray refuses it.
    """
    environment = {"working_dir": str(working_dir), "excludes": list(excludes), "env_vars": dict(env)}
    entrypoint = entrypoint_of(command)
    with job_client(session) as client:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except (RuntimeError, ValueError) as error:
            raise JobError(
                f"Ray refused the job ({first_line(error)}): if the folder is too large, leave files out with"
                " --exclude or give another --working-dir"
            ) from error


def jobs(session: Session) -> list[JobDetails]:
    """Newest last."""
    with job_client(session) as client:
        return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)


def working(session: Session) -> list[str]:
    """Ids of the jobs that have not ended."""
    return [str(job.submission_id) for job in jobs(session) if job is not None and not job.status.is_terminal()]


def find_job(session: Session, job_id: str | None) -> str:
    """The id as given, or of the newest job. Raises `JobError` when there is none."""
    known = [str(job.submission_id) for job in jobs(session)]
    if job_id is None and known:
        return known[-1]
    if job_id not in known:
        raise JobError(f"no job {job_id or 'yet'} on the cluster: there are {', '.join(known) or 'none'}")
    return job_id


def stop(session: Session, job_id: str) -> None:
    """Returns when the job has ended. Its run can be resumed."""
    with job_client(session) as client:
        client.stop_job(job_id)
        deadline = time.monotonic() + 60
        while not client.get_job_status(job_id).is_terminal():
            if time.monotonic() > deadline:
                raise JobError(f"job {job_id} has not ended a minute after it was told to: try again")
            time.sleep(POLL_S)


def follow(session: Session, job_id: str) -> int:
    """Print the job's output from its beginning until it ends; its exit code (1 where it has none).

    A connection that breaks is made again and goes on where it stopped. Raises `JobError` when that fails for
    GIVE_UP_S seconds; the job runs on.
    """
    log, silent_since = JobLog(job_id), time.monotonic()
    while True:
        try:
            with job_client(session) as client:
                asyncio.run(log.follow(client))
                job = client.get_job_info(job_id)
                silent_since = time.monotonic()
                if job.status.is_terminal():
                    log.finish(client)
                    return exit_code(job)
        except (ClusterError, ConnectionError, OSError, RuntimeError) as error:
            if log.heard > silent_since:
                silent_since = log.heard
            if time.monotonic() - silent_since > GIVE_UP_S:
                raise JobError(
                    f"the head has not answered for {GIVE_UP_S / 60:.0f} minutes ({first_line(error)}); the job runs"
                    f" on: follow it later with `bruno-ray cluster logs {job_id}`"
                ) from error
            logger.warning("the connection broke (%s), trying again", first_line(error))
        time.sleep(RECONNECT_S)


def exit_code(job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    logger.error("job %s: %s %s", job.submission_id, job.status.value, first_line(job.message or ""))
    return job.driver_exit_code or 1


class JobLog:
    """Prints a job's output once, however often the connection breaks."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.printed = 0
        """Characters of the log that have been printed."""
        self.heard = 0.0
        """When something last came, on the monotonic clock."""

    async def follow(self, client: JobSubmissionClient) -> None:
        """Returns when the stream ends, with the job or without."""
        seen = 0
        async for text in client.tail_job_logs(self.job_id):
            self._print(text[max(self.printed - seen, 0) :])
            seen += len(text)
            self.heard = time.monotonic()

    def finish(self, client: JobSubmissionClient) -> None:
        """The stream may end before the last lines."""
        self._print(client.get_job_logs(self.job_id)[self.printed :])

    def _print(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self.printed += len(text)

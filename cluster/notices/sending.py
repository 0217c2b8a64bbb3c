"""Handing one notice to a command or a webhook, each within a time-out.

The body that a webhook gets has the text twice, as Slack (`text`) and Discord (`content`) call it. A webhook's address
is its password: nothing here logs or raises more of it than its host. A command may hold one as well, so that neither
it nor what it says is repeated.
"""

import logging
import os
import signal
import subprocess
from dataclasses import dataclass

import httpx

from cluster.errors import NotifyError
from cluster.settings import NotifySettings

logger = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30.0
WEBHOOK_TIMEOUT = httpx.Timeout(10.0)
LONGEST = 1900
"""Characters of a text; Discord takes 2000."""


@dataclass(frozen=True)
class Notice:
    """Something that happened to a cluster."""

    event: str
    """The kind of it, one of those that docs/cluster.md lists."""

    cluster: str
    message: str
    time: float
    """Unix seconds."""

    @property
    def text(self) -> str:
        """One line."""
        return " ".join(f"bruno-ray cluster {self.cluster}: {self.message}".split())[:LONGEST]


def send(notice: Notice, settings: NotifySettings) -> None:
    """Hand it to all that is configured, the others also where one fails. Raises `NotifyError` of the first failure."""
    failed: NotifyError | None = None
    if settings.command:
        try:
            run_command(settings.command, notice)
        except NotifyError as error:
            failed = error
    if settings.webhook is not None:
        try:
            post(settings.webhook.get_secret_value(), notice)
        except NotifyError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def run_command(command: str, notice: Notice, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Run it in a shell with the text on standard input and in CLUSTER_MESSAGE. Raises `NotifyError`."""
    said = {"CLUSTER_EVENT": notice.event, "CLUSTER_NAME": notice.cluster, "CLUSTER_MESSAGE": notice.text}
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **said},
        start_new_session=True,
    )
    try:
        process.communicate(f"{notice.text}\n".encode(), timeout_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise NotifyError(f"notify.command did not end within {timeout_s:g} s and was killed") from error
    if process.returncode:
        raise NotifyError(f"notify.command ended with {process.returncode}; run it by hand to see why")


def post(url: str, notice: Notice) -> None:
    """POST it as JSON. Redirects are not followed, because they would carry the text elsewhere.

    Raises `NotifyError`.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses
    body = {
        "text": notice.text,
        "content": notice.text,
        "event": notice.event,
        "cluster": notice.cluster,
        "time": round(notice.time),
    }
    where, reason = host_of(url), ""
    try:
        with httpx.Client(timeout=WEBHOOK_TIMEOUT) as http, http.stream("POST", url, json=body) as response:
            if not response.is_success:
                reason = f"answers {response.status_code}"
    except httpx.HTTPError as error:
        reason = f"did not take it ({type(error).__name__})"
    if reason:  # outside of the except clause: httpx's own error would be shown with it, and may hold the address
        raise NotifyError(f"notify.webhook at {where} {reason}")


def host_of(url: str) -> str:
    """What of a webhook's address may be shown."""
    return httpx.URL(url).host or "?"

"""The command that tries who is told of what happens: notify."""

import argparse
import time

from cluster.errors import ClusterSettingsError
from cluster.jobs.session import Session
from cluster.notices.sending import Notice, host_of, send


def notify(arguments: argparse.Namespace) -> int:
    """Hand a text to command and webhook from this computer. Raises `NotifyError` where one does not take it."""
    session = Session.open(arguments.cluster_config)
    settings = session.settings.who_to_notify()
    if not settings.is_set:
        raise ClusterSettingsError(
            f"{session.config_file} names nobody: set command or webhook below provider.notify (docs/cluster.md)"
        )
    send(Notice("test", session.name, arguments.text, time.time()), settings)
    webhook = "" if settings.webhook is None else f"the webhook at {host_of(settings.webhook.get_secret_value())}"
    print("told " + " and ".join(part for part in ("the command" if settings.command else "", webhook) if part))
    return 0

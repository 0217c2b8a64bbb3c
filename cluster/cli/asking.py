"""Nothing that costs or destroys happens without a yes."""

import sys

from rich.console import Console
from rich.prompt import Confirm

from cluster.errors import RefusedError


def agree(question: str, yes: bool) -> None:
    """Returns when the user agrees, or has agreed beforehand with ``--yes``. Raises `RefusedError`."""
    if yes:
        return
    if not can_ask():
        raise RefusedError(f"nothing was done: {question.rstrip('?')}? cannot be asked without a terminal; add --yes")
    if not Confirm.ask(question, default=False, console=Console(stderr=True)):
        raise RefusedError("nothing was done: it was not agreed to")


def can_ask() -> bool:
    return sys.stdin.isatty()

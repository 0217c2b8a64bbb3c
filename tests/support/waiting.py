"""The one way in which tests wait: for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

PATIENCE_S = 120.0
"""For what other processes do. A machine that stalls makes a test late, not red."""


def wait_for(
    condition: Callable[[], Value],
    what: str,
    timeout_s: float = PATIENCE_S,
    detail: Callable[[], object] = str,
    interval_s: float = 0.05,
) -> Value:
    """What ``condition`` returns once it is true.

    Args:
        what: for the message, as in "the server is ready".
        detail: called when the time is over; what it returns is added to the message (a log's last lines).

    Raises:
        AssertionError: ``condition`` was not true within ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s:g} s still not so: {what}. {detail()}".rstrip())
        time.sleep(interval_s)
    return value

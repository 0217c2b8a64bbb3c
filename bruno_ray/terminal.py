"""What people see and type: tables that fit, and whether there is anybody to ask."""

import sys

from rich.console import Console

WIDE = 10_000
"""Columns of an output that is no terminal: a table is as wide as it is, and nothing is wrapped."""


def console() -> Console:
    """For standard output. Into a pipe or a file every row of a table is one line."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def can_ask() -> bool:
    """Whether somebody sits at standard input, which may also be closed."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()

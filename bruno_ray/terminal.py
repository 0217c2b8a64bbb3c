"""What people see and type: tables that fit, and questions that can also be left unanswered."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.prompt import Confirm, IntPrompt, Prompt

WIDE = 10_000
"""Columns of an output that is no terminal: a table is as wide as it is, and nothing is wrapped."""


def console() -> Console:
    """For standard output. Into a pipe or a file every row of a table is one line."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def can_ask() -> bool:
    """Whether somebody sits at standard input, which may also be closed."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def ask_number(question: str, choices: Sequence[int]) -> int | None:
    """One of ``choices``, typed by a person; None for an empty answer or the end of the input (Ctrl-D).

    Ctrl-C is KeyboardInterrupt, as everywhere. The question goes to standard error, so that standard output holds
    results only. Ask only where `can_ask`, and hold nothing meanwhile that others wait for: it may take days.
    """
    asked = Console(stderr=True)
    try:
        return IntPrompt.ask(
            f"{question} [dim](Enter: none)[/dim]",
            console=asked,
            choices=[str(number) for number in choices],
            show_choices=False,
            show_default=False,
            default=None,
        )
    except EOFError:
        asked.print()
        return None


def ask_yes(question: str) -> bool | None:
    """A yes or a no, no if the answer is empty; None at the end of the input. Otherwise as `ask_number`."""
    asked = Console(stderr=True)
    try:
        return Confirm.ask(question, default=False, console=asked)
    except EOFError:
        asked.print()
        return None


def ask_text(question: str) -> str | None:
    """A line, typed by a person, empty if they leave it so; None at the end of the input. Otherwise as `ask_number`."""
    asked = Console(stderr=True)
    try:
        return Prompt.ask(question, default="", show_default=False, console=asked).strip()
    except EOFError:
        asked.print()
        return None

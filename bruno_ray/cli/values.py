"""Types of argparse options: text to a number that makes sense, or a line that says what was expected."""

import argparse
from collections.abc import Callable
from typing import Any


def _number(text: str, kind: Callable[[str], Any], accept: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def count(text: str) -> int:
    return _number(text, int, lambda n: n > 0, "a positive whole number")


def index(text: str) -> int:
    return _number(text, int, lambda n: n >= 0, "the number of a trial")


def not_negative(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < float("inf"), "a number from 0")


def positive(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < float("inf"), "a number above 0")


def share(text: str) -> float:
    return _number(text, float, lambda x: 0 < x <= 1, "a number above 0 and up to 1")


def points(text: str) -> float:
    """ "2pp" as 0.02."""
    if not text.endswith("pp"):
        raise argparse.ArgumentTypeError(f"{text!r} is not in percentage points, such as 2pp")
    return _number(text.removesuffix("pp"), float, lambda x: 0 <= x <= 100, "a number of percentage points") / 100


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value

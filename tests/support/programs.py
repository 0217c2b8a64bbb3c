"""Tests that call other programs say what is missing where they cannot run."""

import shutil

import pytest


def needs(*programs: str, package: str) -> pytest.MarkDecorator:
    """A mark that skips a test, with the reason, on a machine without ``programs``; ``package`` has them."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"missing programs: {', '.join(missing)} (install {package})")

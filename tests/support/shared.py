"""Things that take long to make, made once per test run and not once per pytest-xdist worker."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What ``make`` returns, given an empty folder: by whichever worker comes first, the others wait for it.

    Nobody may change it afterwards.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / f"{name}.lock"):
        note = root / f"{name}.made"
        if not note.exists():
            made = make(Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root)))
            note.write_text(str(made))
        return Path(note.read_text())

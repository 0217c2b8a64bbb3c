"""A command at a terminal of its own, for tests of what it asks and how it ends."""

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.support.waiting import wait_for

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROOT = Path(__file__).parents[2]
ENTER, CTRL_C, CTRL_D = "\n", "\x03", "\x04"
"""What the keys send; the terminal makes a signal and an end of input of the latter two."""


def environment(**more: str) -> dict[str, str]:
    """Of a child process: our sources, nothing of a Ray cluster that somebody else has started."""
    kept = {"RAY_worker_niceness"}  # see conftest.py
    inherited = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("RAY_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}


class AtTerminal:
    """``python ARGUMENTS`` with a pseudo-terminal as standard input, output and error, and as its controlling one."""

    def __init__(self, arguments: Sequence[str], cwd: Path, **variables: str) -> None:
        """``variables``: of its environment, beside the usual ones."""
        self._written = ""
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", BECOME_LEADER, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment(COLUMNS="200", **variables),
            start_new_session=True,
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._ours, 65536)
            except OSError:  # how a terminal ends when nobody has it open any more
                return
            self._written += piece.decode(errors="replace")

    @property
    def text(self) -> str:
        """Everything it has written so far and what was typed, without colours."""
        return COLOURS.sub("", self._written)

    def wait_for_text(self, text: str) -> None:
        wait_for(
            lambda: text in self.text or self.process.poll() is not None,
            f"the command asks {text!r}",
            timeout_s=600,
            detail=lambda: self.text[-3000:],
        )
        assert text in self.text, self.text[-3000:]

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def exit_code(self) -> int:
        """Waits for the end, and for all of the text."""
        code = self.process.wait(600)
        self._reader.join(10)
        return code


BECOME_LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

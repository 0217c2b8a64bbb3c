"""How every program of this project ends: one line for an error, and the exit code."""

import os
import sys
from collections.abc import Callable

from bruno_ray.errors import BrunoError

FAILED = 2
INTERRUPTED = 130


def exit_code(program: Callable[[], int | None]) -> int:
    """Run ``program`` and return the exit code for the shell.

    A `BrunoError` is one line and 2, Ctrl-C is one line and 130, a reader of the output that has left is no error.
    Anything else is a defect and keeps its traceback.
    """
    try:
        code = program() or 0
        sys.stdout.flush()
        return code
    except BrunoError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

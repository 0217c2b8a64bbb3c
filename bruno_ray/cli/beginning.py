"""When this program began, before it could look at a clock."""

import os
import time
from pathlib import Path

import psutil


def process_began() -> float:
    """The moment this process was started, of ``time.perf_counter``, to a hundredth of a second on Linux."""
    return time.perf_counter() - _age()


def _age() -> float:
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2]
    except OSError:  # no Linux
        return time.time() - psutil.Process().create_time()
    ticks = int(after_name.split()[19])  # since boot, whose date psutil knows to a second only
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

"""Wall and CPU time of a command and of everything that it starts.

CPU time is sampled, because Ray's daemons are not children that anybody waits for: a process counts with what it had
used when it was last seen, so up to half a second of each is missing. A process that was seen once stays in the sum,
also when its parent is gone.
"""

import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.5


@dataclass(frozen=True)
class Usage:
    """When a command ran, in seconds since the epoch, and what it had used by then."""

    started: float
    finished: float
    samples: list[tuple[float, float]] = field(repr=False)
    """(time, CPU seconds of the tree until then), in order of time."""

    def cpu_until(self, moment: float) -> float:
        """CPU seconds of the tree up to a moment, linear between samples.

        >>> Usage(0.0, 4.0, [(0.0, 0.0), (2.0, 1.0), (4.0, 4.0)]).cpu_until(3.0)
        2.5
        """
        times = [time for time, _ in self.samples]
        i = bisect_left(times, moment)
        if i == 0:
            return self.samples[0][1]
        if i == len(times):
            return self.samples[-1][1]
        (t0, c0), (t1, c1) = self.samples[i - 1 : i + 1]
        return c0 + (c1 - c0) * (moment - t0) / (t1 - t0)


def run_measured(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Usage:
    """Run a command to its end, output to a file. Raises CalledProcessError, with the file's end, if it fails."""
    with log.open("w") as stream:
        started = time.time()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=dict(environment))
        tree = _Tree(process.pid)
        sampler = threading.Thread(target=tree.watch, daemon=True)
        sampler.start()
        try:
            code = process.wait()
        finally:
            finished = time.time()
            tree.ended.set()
            sampler.join()
    if code:
        end = log.read_text()[-2000:]
        print(end, file=sys.stderr)
        raise subprocess.CalledProcessError(code, command, end)
    return Usage(started, finished, tree.samples)


class _Tree:
    def __init__(self, root: int) -> None:
        self.ended = threading.Event()
        self.samples: list[tuple[float, float]] = [(time.time(), 0.0)]
        self._root = root
        self._used: dict[psutil.Process, float] = {}

    def watch(self) -> None:
        while not self.ended.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        """One pass over all processes, which takes some milliseconds."""
        running = {process.pid: process for process in psutil.process_iter(["ppid", "cpu_times"])}
        members = {process.pid for process in self._used if running.get(process.pid) == process} | {self._root}
        children: dict[int, list[int]] = {}
        for pid, process in running.items():
            children.setdefault(process.info["ppid"], []).append(pid)
        todo = list(members)
        while todo:
            more = [pid for pid in children.get(todo.pop(), ()) if pid not in members]
            members.update(more)
            todo += more
        for pid in members & running.keys():
            times = running[pid].info["cpu_times"]
            if times is not None:
                self._used[running[pid]] = times.user + times.system
        self.samples.append((time.time(), sum(self._used.values())))

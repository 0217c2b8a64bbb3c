"""Each event is told once, in the background, whatever becomes of the process that noticed it.

What has been told is in a file, so that a restarted autoscaler does not tell it again. An event whose cause has passed
can be armed again, and is then told the next time. Several processes of a machine share the file.
"""

import json
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from bruno_ray.files import write_json
from cluster.clock import Clock
from cluster.errors import ClusterSettingsError, NotifyError
from cluster.notices.sending import Notice, send
from cluster.settings import ClusterSettings

logger = logging.getLogger(__name__)

PAUSES_S = (5.0, 30.0, 120.0)
"""Before each further attempt to hand a notice over."""

LOCK_S = 10.0


class Notices:
    """`tell` and `arm` return at once and raise nothing; one thread does what takes time."""

    def __init__(
        self,
        folder: Path,
        cluster: str,
        settings: ClusterSettings,
        clock: Clock,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._file = folder / "notices.json"
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        self._pauses_s = pauses_s
        self._told: set[str] | None = None
        """Keys that need no telling, those that are being told among them; None before the file was read."""
        self._work: queue.Queue[Callable[[], None]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._failing = False

    @property
    def wanted(self) -> bool:
        """Whether anybody is to be told."""
        return self._settings.notify_file is not None or self._settings.notify.is_set

    def tell(self, event: str, message: str, key: str = "") -> None:
        """Tell it, unless the event with this `key` has been told since it was last armed."""
        key = f"{event}:{key}"
        with self._lock:
            if not self.wanted or key in self._known():
                return
            self._known().add(key)
        notice = Notice(event, self._cluster, message, self._clock.time())
        self._do(lambda: self._deliver(key, notice))

    def arm(self, event: str, key: str = "") -> None:
        """The cause has passed: the next time is to be told again."""
        key = f"{event}:{key}"
        with self._lock:
            if not self.wanted or key not in self._known():
                return
            self._known().discard(key)
        self._do(lambda: self._note(key, told=False))

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is told that was to be told, for so long at most; False where it was not."""
        done = threading.Event()
        self._do(done.set)
        return done.wait(timeout_s)

    def _do(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._work.put(work)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="notices", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._work.get()()

    def _deliver(self, key: str, notice: Notice) -> None:
        """Try, and try again. What nobody took in the end is not tried at every look, and counts as told."""
        for pause_s in (*self._pauses_s, None):
            try:
                send(notice, self._settings.who_to_notify())
            except (NotifyError, ClusterSettingsError, OSError) as error:
                level = logging.DEBUG if self._failing else logging.ERROR
                logger.log(level, "%s, which was to be told of: %s", error, notice.message)
                self._failing = True
            else:
                self._failing = False
                break
            if pause_s is not None:
                self._clock.sleep(pause_s)
        self._note(key, told=True)

    def _known(self) -> set[str]:
        if self._told is None:
            self._told = set(self._read())
        return self._told

    def _note(self, key: str, *, told: bool) -> None:
        try:
            with FileLock(self._file.with_suffix(".lock"), timeout=LOCK_S):
                entries = self._read()
                if told:
                    entries[key] = self._clock.time()
                else:
                    entries.pop(key, None)
                write_json(self._file, entries)
        except (OSError, Timeout) as error:
            logger.warning("what has been told could not be noted in %s: %s", self._file, error)

    def _read(self) -> dict[str, float]:
        """Unix seconds at which each was told, by event and key."""
        try:
            entries = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is begun anew", self._file, error)
            return {}
        return entries if isinstance(entries, dict) else {}

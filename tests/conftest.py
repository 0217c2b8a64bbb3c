"""Settings of the whole suite: offline, one thread per process, nothing read from the user's environment."""

import logging
import os
import signal
from collections.abc import Iterator

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A suite that was started in the background: the commands that it ends by Ctrl-C would not notice.
    signal.signal(signal.SIGINT, signal.default_int_handler)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
# Workers that give way starve beside the cluster's lab: 243 s instead of 28. Ray spells it in small letters.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
for variable in [name for name in os.environ if name.startswith("BRUNO_") and name != "BRUNO_CACHE"]:
    del os.environ[variable]

import pytest  # noqa: E402 - the libraries read the environment when they are imported

pytest_plugins = ["tests.support.organism_fixture"]

LONGEST_FIRST = ("lab", "ray", "server", "deploy", "copies", "small")
"""Groups of tests (`xdist_group`) in the order in which they begin; all other tests come after them."""


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are for tests that are marked so (`-m gpu`): all others compare with what a CPU computes."""
    if config.getoption("-m") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Two spinning thread pools on two cores are ten times slower than one thread each."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """A command that runs in this process says how much is logged from then on: not in the tests that follow."""
    loggers = [logging.getLogger(name) for name in ("bruno_ray", "cluster", "serve", "httpx")]
    levels = [each.level for each in loggers]
    yield
    for each, level in zip(loggers, levels):
        each.setLevel(level)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray and belong to no other group follow each other in one process: two clusters at a time would
    take turns on the cores, and many of them share one.

    The longest groups come first, so that none is left for one process when the others have nothing to do any more.
    """
    for item in items:
        if item.get_closest_marker("ray") and not group_of(item):
            item.add_marker(pytest.mark.xdist_group("ray"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: ranks.get(group_of(item), len(ranks)))


def group_of(item: pytest.Item) -> str:
    """Group of tests that run in one process one after the other; empty for a test that may run anywhere."""
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark is not None else ""

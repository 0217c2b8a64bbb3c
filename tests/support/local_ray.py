"""One local Ray cluster for all tests of a process that need no other: starting one takes ten seconds and more.

pytest_plugins = ["tests.support.local_ray"]
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import ray

from bruno_ray.workers.session import ray_session
from tests.support.study_driver import settings


@pytest.fixture(scope="session")
def ray_sessions() -> Iterator[ExitStack]:
    with ExitStack() as sessions:
        yield sessions


@pytest.fixture(scope="module")
def local_ray(ray_sessions: ExitStack) -> None:
    """Started by the first module that asks for it, and again after one that had a cluster of its own."""
    if not ray.is_initialized():
        ray_sessions.enter_context(ray_session(settings(workers=2).ray))


@pytest.fixture(scope="module")
def joining(local_ray: None) -> dict[str, str]:
    """Environment of a command in a process of its own that joins the cluster instead of starting one."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}  # its token among them
    return {**ours, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

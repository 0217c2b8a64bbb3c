"""Ray in a star: workers use each other's objects and call each other's actors, through the head, 60 ms away."""

import json
from collections.abc import Iterator

import pytest

from tests.cluster.lab import Lab
from tests.cluster.lab.far_away import ROUND_TRIP_S
from tests.cluster.lab.ray_lab import RayLab
from tests.cluster.ssh import KeyPair

pytestmark = [
    *(pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(1200)),
]

DRIVER = """
import json
import numpy as np, ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=0.1)
class Worker:
    def where(self):
        return ray.util.get_node_ip_address()
    def give(self, value):
        return np.full(2_000_000, value, np.uint8)
    def total(self, array):
        return int(array.sum())
    def ask(self, other):
        return ray.get(other.where.remote(), timeout=60)

first, second = (Worker.options(resources={f"node{index}": 0.1}).remote() for index in (1, 2))
where = ray.get([first.where.remote(), second.where.remote()], timeout=300)
totals = ray.get([first.total.remote(second.give.remote(2)), second.total.remote(first.give.remote(1))], timeout=120)
# One after the other: an actor that asks does not answer meanwhile.
called = [ray.get(one.ask.remote(other), timeout=120) for one, other in ((first, second), (second, first))]
print("RESULT " + json.dumps({"where": where, "totals": totals, "called": called}))
"""


@pytest.fixture(scope="module")
def star(namespaces: None, key: KeyPair) -> Iterator[RayLab]:
    with Lab(ROUND_TRIP_S) as lab:
        cluster = RayLab(lab, key.private, key.public, workers=2, network="star")
        cluster.start()
        yield cluster


def test_workers_use_each_other_s_objects_and_actors(star: RayLab) -> None:
    said = star.python(DRIVER)
    (line,) = [line for line in said.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    first, second = star.address(1).alias, star.address(2).alias
    assert result["where"] == [first, second]
    assert result["totals"] == [4_000_000, 2_000_000]
    assert result["called"] == [second, first]

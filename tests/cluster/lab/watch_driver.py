"""A driver that keeps two workers busy and writes down, each half second, what it sees: ~/watch.jsonl.

Copied to the head and run there. Counters live in actors that restart elsewhere when their machine is lost.
"""

import json
import pathlib
import time

import ray

LOG = pathlib.Path("~/watch.jsonl").expanduser()


@ray.remote(num_gpus=1, num_cpus=1, max_restarts=-1, max_task_retries=-1)
class Worker:
    def where(self) -> str:
        return ray.util.get_node_ip_address()


@ray.remote(num_cpus=0.1, max_retries=-1)
def square(number: int) -> int:
    time.sleep(0.05)
    return number * number


def main() -> None:
    ray.init(address="auto", log_to_driver=False)
    workers = [Worker.remote() for _ in range(2)]
    pending = {}
    done = errors = number = 0
    with LOG.open("w") as log:
        while True:
            for _ in range(4):
                pending[square.remote(number)] = number
                number += 1
            for index, worker in enumerate(workers):
                if not any(isinstance(what, tuple) and what[0] == index for what in pending.values()):
                    pending[worker.where.remote()] = (index, time.time())
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0.5)
            where = {}
            for reference in ready:
                what = pending.pop(reference)
                try:
                    value = ray.get(reference)
                except ray.exceptions.RayError:
                    errors += 1
                    continue
                if isinstance(what, tuple):
                    where[what[0]] = value
                else:
                    done += value == what * what
            nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
            row = {"time": time.time(), "done": done, "errors": errors, "asked": number, "where": where, "nodes": nodes}
            log.write(json.dumps(row) + "\n")
            log.flush()
            time.sleep(0.3)


main()

"""One engine that serves a base model and seven edits of it, against eight engines with a model copy each.

    python -m benchmarks.serve_copies [--layers 8] [--width 256] [--tokens 64] [--rounds 3]

The copies are processes of their own, as eight servers would be; the edits of seven are in their weights. One engine
and eight have the same processor core between them, one torch thread each, and the same answers to give: 1 or 8 at a
time of each of the eight models. Memory is what would be free if the processes ended, after the work. Engines alone:
no HTTP. The table goes to ``RESULTS.md``.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.results import write_section
from benchmarks.serve_parts import SHORTEST, cpu_seconds, end_in_order, make_model, private_bytes

N_MODELS = 8
AT_A_TIME = (1, 8)
"""Answers of each model."""

RANK = 1


# ----- the processes that hold engines -----


def edits(n_layers: int, width: int) -> tuple[list, dict]:
    """Seven edits of attention and MLP, and the bank with their directions."""
    import torch

    from bruno_ray.ablation.edit import AblationParameters, Edit

    generator = torch.Generator().manual_seed(0)
    directions_LRD = torch.randn(n_layers + 1, RANK, width, generator=generator)
    bank = {"random": torch.nn.functional.normalize(directions_LRD, dim=-1)}

    def edit(k: int) -> Edit:
        kernel = AblationParameters(0.6 + 0.1 * k, n_layers / 2, 0.3, float(n_layers))
        return Edit({"attention": kernel, "mlp": kernel}, "random", None, "pre")

    return [edit(k) for k in range(N_MODELS - 1)], bank


def hold(folder: Path, which: int | None) -> None:
    """Answer the requests that come as lines of JSON. ``which``: only this model, its edit in the weights; else all."""
    import torch

    from bruno_ray.ablation.baking import bake
    from bruno_ray.model.loading import load_model
    from bruno_ray.settings import ModelSettings
    from serve.engine.engine import ServingEngine
    from serve.settings import EngineSettings

    torch.set_num_threads(1)
    loaded = load_model(ModelSettings(id=str(folder), dtypes=("float32",)))
    found, bank = edits(loaded.architecture.n_layers, loaded.architecture.d_model)
    if which:  # 0 is the base
        bake(loaded.architecture, found[which - 1], bank)
    engine = ServingEngine(loaded, EngineSettings())
    if which is None:
        for k, edit in enumerate(found, start=1):
            engine.add_edit(str(k), edit, bank)
    keys = [str(k) if k else None for k in range(N_MODELS)] if which is None else [None]
    print("ready", flush=True)
    for line in sys.stdin:
        n_tokens = asyncio.run(_work(engine, keys, **json.loads(line)))
        print(n_tokens, flush=True)
    engine.close()


async def _work(engine, keys: Sequence[str | None], at_a_time: int, answers: int, tokens: int, seed: int) -> int:
    """Of every model so many answers at a time, one after another. Returns the number of tokens."""
    from serve.engine.engine import GenerationRequest

    async def reader(key: str | None, number: int) -> int:
        generator = random.Random(f"{seed} {number}")
        total = 0
        for _ in range(answers):
            ids = tuple(generator.choices(range(16, 256), k=generator.randint(SHORTEST, 96)))
            request = GenerationRequest(ids, key, tokens, temperature=0.0, ignore_eos=True)
            async for event in engine.generate(request):
                if event.finish_reason not in (None, "length"):
                    raise RuntimeError(f"an answer ended with {event.finish_reason}: {event.error}")
                last = event.n_completion
            total += last
        return total

    return sum(await asyncio.gather(*(reader(key, i) for key in keys for i in range(at_a_time))))


# ----- the measurement -----


class Holders:
    """Processes with engines, all on one core."""

    def __init__(self, folder: Path, whiches: Sequence[int | None], core: int) -> None:
        command = [sys.executable, "-m", "benchmarks.serve_copies", "--hold", str(folder)]
        self._processes = []
        for which in whiches:
            process = subprocess.Popen(
                [*command, *([] if which is None else ["--which", str(which)])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )  # fmt: skip
            self._processes.append(process)
        for process in self._processes:
            self._line(process)
            for thread in psutil.Process(process.pid).threads():
                os.sched_setaffinity(thread.id, {core})

    def _line(self, process: subprocess.Popen) -> str:
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"a process with an engine has ended (exit code {process.wait()})")
        return line

    @property
    def _psutil(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self._processes]

    def work(self, **asked: int) -> tuple[float, float]:
        """Tokens per second of wall time, and per CPU second."""
        before, start = cpu_seconds(self._psutil), time.perf_counter()
        for process in self._processes:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        tokens = sum(int(self._line(process)) for process in self._processes)
        return tokens / (time.perf_counter() - start), tokens / (cpu_seconds(self._psutil) - before)

    def memory(self) -> int:
        return private_bytes(self._psutil)

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait(60)


def measure(folder: Path, tokens: int, answers: int, rounds: int) -> tuple[dict, dict[str, int]]:
    """((name, answers at a time) -> [(tokens/s, tokens per CPU second)], name -> bytes)."""
    core = max(os.sched_getaffinity(0))
    sides = {
        "base and 7 edits in one engine": Holders(folder, [None], core),
        "8 engines with a copy each": Holders(folder, range(N_MODELS), core),
    }
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number in range(-1, rounds):  # the first one warms up
        for at_a_time in AT_A_TIME:
            for name, holders in sides.items():
                got = holders.work(at_a_time=at_a_time, answers=answers, tokens=tokens, seed=number)
                print(f"round {number}, {at_a_time} of each, {name}: {got[0]:.0f} tokens/s", flush=True)
                if number >= 0:
                    found.setdefault((name, at_a_time), []).append(got)
    memory = {name: holders.memory() for name, holders in sides.items()}
    for holders in sides.values():
        holders.close()
    return found, memory


def table(found: dict, memory: dict[str, int], head: str) -> str:
    lines = [
        "## Edits against copies (`python -m benchmarks.serve_copies`)",
        "",
        head,
        "",
        "| | memory, MB |" + "".join(f" {n} of each: tokens/s | per CPU s |" for n in AT_A_TIME),
        "|---|---|" + "---|---|" * len(AT_A_TIME),
    ]
    for name, size in memory.items():
        figures = ""
        for n in AT_A_TIME:
            wall, cpu = (statistics.median(values) for values in zip(*found[name, n]))
            figures += f" {wall:.0f} | {cpu:.0f} |"
        lines.append(f"| {name} | {size / 1e6:.0f} |{figures}")
    one, many = memory
    ratios = [
        f"{statistics.median(a[0] / b[0] for a, b in zip(found[one, n], found[many, n])):.2f}x the throughput at"
        f" {n} of each"
        for n in AT_A_TIME
    ]
    return "\n".join(
        [*lines, "", f"One engine has {memory[one] / memory[many]:.2f}x the memory and {', '.join(ratios)}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answers", type=int, default=2, help="by each reader in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-table", action="store_true", help="leave RESULTS.md as it is")
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--which", type=int, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    end_in_order()
    if settings.hold:
        hold(settings.hold, settings.which)
        return
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        n_parameters = make_model(Path(name), settings.layers, settings.width)
        found, memory = measure(Path(name), settings.tokens, settings.answers, settings.rounds)
    result = table(
        found,
        memory,
        f"Random llama, {settings.layers} layers of width {settings.width} ({n_parameters / 1e6:.1f} M parameters,"
        f" {4 * n_parameters / 1e6:.0f} MB), float32; answers of {settings.tokens} tokens, medians of"
        f" {settings.rounds} rounds in turns.",
    )
    print(result)
    if not settings.no_table:
        write_section("serve_copies", result)


if __name__ == "__main__":
    main()

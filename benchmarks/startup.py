"""What a short run of the organism spends its time on, by stage: a whole command, and the time that is in no stage.

    python benchmarks/startup.py [--trials 16] [--rounds 3] [--before CHECKOUT]

With ``--before``, a folder with another version of this repository whose run.json has the same stages, both run in
turns. Per stage and for the whole command it is the median over the rounds; CPU seconds are those of the command with
everything that it started (``process_tree.py``). The table goes to ``RESULTS.md``.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from process_tree import run_measured
from results import write_section

from bruno_ray import organism
from bruno_ray.runs.directory import RunDirectory

REPOSITORY = Path(__file__).parent.parent
PROMPTS = 100


@dataclass(frozen=True)
class Command:
    """One run of the command line."""

    wall: float
    cpu: float
    stages: Mapping[str, float]

    @property
    def elsewhere(self) -> float:
        return self.wall - sum(self.stages.values())


def run(checkout: Path, trials: int) -> Command:
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        words = [sys.executable, "-m", "bruno_ray.cli.main", "run", "--behaviour", "organism", "--method", "searched"]
        words += ["--auto-select", "--study-name", "run", "--trials", str(trials), "--output.directory", str(folder)]
        words += [f"--prompts.n-{part}={PROMPTS}" for part in ("train", "validation")]
        words += ["--residuals.cache-dir", str(folder / "residuals"), "--ray.object-store-memory", "100000000"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        usage = run_measured(words, folder / "log", environment | {"PYTHONPATH": str(checkout)})
        stages = RunDirectory.open(folder / "run").read().timings
        return Command(usage.finished - usage.started, usage.samples[-1][1], stages)


def table(found: Mapping[str, Sequence[Command]]) -> list[str]:
    stages = list(dict.fromkeys(stage for commands in found.values() for each in commands for stage in each.stages))

    def row(name: str, values: Mapping[str, list[float]]) -> str:
        return f"| {' | '.join([name, *(f'{statistics.median(each):.1f}' for each in values.values())])} |"

    lines = [f"| seconds | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for stage in stages:
        lines.append(row(stage, {name: [each.stages.get(stage, 0.0) for each in all_] for name, all_ in found.items()}))
    lines.append(row("in no stage", {name: [each.elsewhere for each in all_] for name, all_ in found.items()}))
    lines.append(row("**whole command**", {name: [each.wall for each in all_] for name, all_ in found.items()}))
    lines.append(row("its CPU seconds", {name: [each.cpu for each in all_] for name, all_ in found.items()}))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="a checkout of another version to compare with")
    parser.add_argument("--no-table", action="store_true", help="print, and leave RESULTS.md alone")
    arguments = parser.parse_args()
    organism.build()
    checkouts = ({"before": arguments.before.absolute()} if arguments.before else {}) | {"now": REPOSITORY}
    found: dict[str, list[Command]] = {name: [] for name in checkouts}
    for number in range(arguments.rounds):
        for name in list(checkouts)[:: 1 if number % 2 else -1]:
            found[name].append(run(checkouts[name], arguments.trials))
            print(name, found[name][-1], flush=True)
    text = "\n".join(
        [
            "## A short run, by stage (`python benchmarks/startup.py`)",
            "",
            f"Organism, {arguments.trials} trials, {PROMPTS} + {PROMPTS} prompts, `--auto-select`, medians of"
            f" {arguments.rounds} rounds{' in turns' if arguments.before else ''}; load of the machine at the end"
            f" {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores.",
            "",
            *table(found),
        ]
    )
    print(text)
    if not arguments.no_table:
        write_section("startup", text)


if __name__ == "__main__":
    main()

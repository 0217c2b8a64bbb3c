"""Which sampler finds the front soonest, and what parallel trials cost it: hypervolume against trials.

    python benchmarks/samplers.py own|FOLDER [--trials 60] [--startup 20] [--seeds 1 2 3]

Studies of an organism (the project's own, or one that `organisms.py` takes) in this process (``in_process.py``), with
the product's schedules: one trial evaluated at a time, one batch of 8, and four workers with batches of 8, each asked
for ahead of time as always, so that up to 2, 16 and 64 trials are under way. The startup points are the same for all
samplers. Hypervolume is of behaviour rate and KL below (1, 1 nat), the KL in powers of ten down to 1e-5: on a linear
scale every sampler has 0.99 after the startup. CMA-ES minimises one objective, here the share of prompts without a
proper answer, and knows nothing of the KL; its trials are measured by the same two figures.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from results import write_section
from tested_models import OWN, Foreign, Own
from vs_heretic import hypervolume

from bruno_ray.study.selection import BEHAVIOUR, KL, TrialRecord

SAMPLERS = ("tpe", "gp", "nsga2", "cmaes")
SCHEDULES = {1: (1, 1), 8: (1, 8), 32: (4, 8)}
"""Trials evaluated at once -> workers, batch size."""

SMALLEST_KL = 1e-5
ONE_OBJECTIVE = ("evasion_rate",)


def covered(trials: Sequence[TrialRecord]) -> float:
    """Hypervolume, 0 to 1."""
    points = []
    for trial in trials:
        if trial.state == "COMPLETE":
            kl = max(trial.values[KL], SMALLEST_KL)
            points.append((trial.values[BEHAVIOUR], 1 - math.log10(kl) / math.log10(SMALLEST_KL)))
    return hypervolume(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("organism", help="`own`, or the folder of one")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--startup", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Own() if options.organism == OWN else Foreign(Path(options.organism).resolve())
    lab = model.lab
    usual = lab.settings
    single = usual.model_copy(update={"scoring": usual.scoring.model_copy(update={"objectives": ONE_OBJECTIVE})})
    marks = sorted({*range(options.startup, options.trials, 10), options.trials})
    lines = [
        "## Samplers and trials at once (`benchmarks/samplers.py`)",
        "",
        f"Organism `{model.name}`, {options.trials} trials, {options.startup} of them startup points that all"
        f" samplers share, seeds {', '.join(map(str, options.seeds))}. Hypervolume of behaviour rate and log10 KL (1e-5"
        " to 1 nat) after so many trials, mean over seeds and, of the last, the range; CPU seconds of a study. CMA-ES"
        f" minimises {ONE_OBJECTIVE[0]} alone.",
        "",
        f"| sampler | at once | {' | '.join(map(str, marks))} | range | CPU s |",
        "|---|---|" + "---|" * (len(marks) + 2),
    ]
    print("\n".join(lines), flush=True)
    for sampler in SAMPLERS:
        if sampler == "cmaes" and find_spec("cmaes") is None:
            lines.append("| cmaes | | the package is not installed |" + " |" * (len(marks) + 1))
            continue
        lab.settings = single if sampler == "cmaes" else usual
        for at_once, (workers, batch) in SCHEDULES.items():
            found, seconds = [], []
            for seed in options.seeds:
                start = time.process_time()
                done = lab.search(
                    seed=seed,
                    n_trials=options.trials,
                    workers=workers,
                    n_startup_trials=options.startup,
                    trials_per_batch=batch,
                    sampler=sampler,
                )
                seconds.append(time.process_time() - start)
                found.append([covered(done.trials[:mark]) for mark in marks])
            means = [statistics.mean(column) for column in zip(*found)]
            last = [row[-1] for row in found]
            lines.append(
                f"| {sampler} | {at_once} | {' | '.join(f'{value:.3f}' for value in means)}"
                f" | {min(last):.3f} to {max(last):.3f} | {statistics.mean(seconds):.0f} |"
            )
            print(lines[-1], flush=True)
    write_section("samplers", "\n".join(lines))


if __name__ == "__main__":
    main()

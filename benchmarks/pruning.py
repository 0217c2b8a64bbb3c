"""What pruning saves, and that it changes no front: studies of the organism with and without it.

    python benchmarks/pruning.py [--trials 60] [--seeds 1 2 3 4 5]

First table: the same study (seed, sampler, schedule) with and without pruning. Tokens are those of all answers that
the study asked for. What was pruned is evaluated to the end afterwards: "not dominated" counts trials that would then
have been on the front.

Second table: 60 startup points, which every schedule has alike, under several schedules, batches coming back in a
random order. The fronts must be the same list of trials as without pruning.
"""

import argparse
import random
import statistics
from collections.abc import Sequence

from in_process import Done, Lab
from results import write_section

from bruno_ray.ablation.edit import Edit
from bruno_ray.study.selection import TrialRecord, auto_select, pareto_front

SCHEDULES = (("1 worker, batches of 1", 1, 1), ("1 worker, batches of 8", 1, 8), ("4 workers, batches of 8", 4, 8))


def not_dominated(lab: Lab, done: Done) -> int:
    """Pruned trials that are on the front once they are evaluated to the end."""
    objectives = lab.settings.scoring.objectives
    pruned = [trial for trial in done.trials if trial.state == "PRUNED"]
    whole = list(done.front)
    for trial in pruned:
        (outcome,) = lab.worker.evaluate(lab.context, [Edit.from_dict(dict(trial.edit or {}))])
        assert outcome.scores is not None
        whole.append(TrialRecord(trial.number, "COMPLETE", trial.edit, outcome.scores.values))
    numbers = {trial.number for trial in pruned}
    return sum(trial.number in numbers for trial in pareto_front(whole, objectives))


def pick(lab: Lab, done: Done) -> str:
    choice = auto_select(done.trials, lab.settings.selection.max_kl, lab.settings.scoring.objectives).trial
    return f"{choice.number}: {choice.counts['behaviour_rate'][0]}, KL {choice.values['kl_divergence']:.5f}"


def saved(lab: Lab, n_trials: int, seeds: Sequence[int]) -> list[str]:
    rows = [
        "| seed | answer tokens | with pruning | saved | pruned | hypervolume | with pruning | pick: refusals, KL"
        " | with pruning | not dominated |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    shares, losses = [], []
    for seed in seeds:
        without = lab.search(seed, n_trials, prune=False)
        pruning = lab.search(seed, n_trials, prune=True)
        n = sum(trial.state == "PRUNED" for trial in pruning.trials)
        shares.append(1 - pruning.generated / without.generated)
        losses.append(1 - pruning.hypervolume / without.hypervolume)
        rows.append(
            f"| {seed} | {without.generated:,} | {pruning.generated:,} | {shares[-1]:.0%} | {n} of {n_trials}"
            f" | {without.hypervolume:.5f} | {pruning.hypervolume:.5f} | {pick(lab, without)} | {pick(lab, pruning)}"
            f" | {not_dominated(lab, pruning)} |"
        )
    rows += [
        "",
        f"Saved {min(shares):.0%} to {max(shares):.0%} of the tokens, {statistics.mean(shares):.0%} on average; the"
        f" largest loss of hypervolume is {max(losses):.4%}.",
    ]
    return rows


def schedules(lab: Lab, n_trials: int) -> list[str]:
    rows = ["| schedule | pruned | answer tokens | same front |", "| --- | ---: | ---: | --- |"]
    options = {"seed": 1, "n_trials": n_trials, "n_startup_trials": n_trials}
    without = lab.search(**options, prune=False)
    front = [trial.number for trial in without.front]
    rows.append(f"| without pruning | 0 | {without.generated:,} | |")
    for name, workers, batch in SCHEDULES:
        source = random.Random(1)
        done = lab.search(
            **options,
            order=lambda flying, source=source: source.randrange(flying),
            workers=workers,
            trials_per_batch=batch,
            prune=True,
        )
        n = sum(trial.state == "PRUNED" for trial in done.trials)
        same = "yes" if [trial.number for trial in done.front] == front else "NO"
        rows.append(f"| {name} | {n} | {done.generated:,} | {same} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    lab = Lab()
    lines = [
        "## Pruning of dominated trials",
        "",
        f"`benchmarks/pruning.py`: {options.trials} trials of the organism's study, 20 of them at startup,"
        f" {len(lab.prompts.target.validation)} target prompts.",
        "",
        *saved(lab, options.trials, options.seeds),
        "",
        f"{options.trials} startup points, in schedules that prune at other times:",
        "",
        *schedules(lab, options.trials),
    ]
    print("\n".join(lines))
    write_section("pruning", "\n".join(lines))


if __name__ == "__main__":
    main()

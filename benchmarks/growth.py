"""How the cost of a trial grows: with prompts, answer tokens, layers, and trials in flight; one process, one thread.

    python benchmarks/growth.py [--repeats 3] [--no-table]

On random llamas (`serve_parts.py` makes them) whose answers never end by themselves, with the load of
`bruno_ray/pipeline/benching.py`: one axis varies, the others stay at their middle. Trials in flight are also measured
on the organism, with the default scorers and the edits of a study, all of them once for every K; what is remembered of
earlier answers is forgotten before.

Every point is timed some times, in turns with all others, and the lowest counts: what else the machine does only adds.
An axis' exponent is the slope of log(CPU seconds of all trials) over log(value), by least squares over its upper half:
1 is linear. Below 1 something is shared, or is there once; above 1, what grows faster would show. The table
goes to ``RESULTS.md``, the picture to ``docs/growth.svg``.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from in_process import Lab
from results import write_section
from serve_parts import make_model

from bruno_ray.ablation.edit import Edit
from bruno_ray.generation.decoding import Drafts
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline.benching import Load, TrialLoad
from bruno_ray.settings import ModelSettings

PICTURE = Path(__file__).parent.parent / "docs" / "growth.svg"

LAYERS, WIDTH = 4, 128
LOAD = Load(prompts=32, prompt_tokens=24, response_tokens=16, kl_tokens=8)
AT_ONCE = 4
IN_FLIGHT = (1, 2, 4, 8, 16, 32)
AXES = {
    "prompts a side": (8, 16, 32, 64, 128),
    "answer tokens": (8, 16, 32, 64, 128),
    "layers": (2, 4, 8, 16, 32),
    "trials in flight": IN_FLIGHT,
}
ORGANISM = "trials in flight, organism"

COLOURS = ("#2563eb", "#c2410c", "#0f766e", "#7c3aed", "#6b7280")
WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 60, 20, 220, 50


@dataclass(frozen=True)
class Cost:
    """Seconds of all trials that one call evaluates."""

    wall: float
    cpu: float
    trials: int


Measure = Callable[[], Cost]


def timed(work: Callable[[], object], trials: int) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, trials)


def on_a_random_model(folder: Path, axis: str, value: int) -> Measure:
    """One point of one axis."""
    load, layers, trials = LOAD, LAYERS, AT_ONCE
    match axis:
        case "prompts a side":
            load = replace(LOAD, prompts=value)
        case "answer tokens":
            load = replace(LOAD, response_tokens=value)
        case "layers":
            layers = value
        case "trials in flight":
            trials = value
    model = folder / f"{layers}"
    if not model.exists():
        make_model(model, layers, WIDTH)
    engine = BatchEngine(load_model(ModelSettings(id=str(model), dtypes=("float32",))))
    engine.end_ids, engine.drafting = frozenset(), False
    trial = TrialLoad(engine, load)
    return lambda: timed(lambda: trial.run(trial.edits(trials)), trials)


def on_the_organism(lab: Lab, edits: Sequence[Edit], at_once: int) -> Measure:
    """The same edits for every K, so many in one call."""

    def evaluate() -> None:
        for start in range(0, len(edits), at_once):
            lab.worker.evaluate(lab.context, list(edits[start : start + at_once]))

    def measure() -> Cost:
        lab.worker.engine._drafts = Drafts()
        all_of_them = timed(evaluate, len(edits))
        share = at_once / len(edits)
        return Cost(all_of_them.wall * share, all_of_them.cpu * share, at_once)

    return measure


def exponent(points: Mapping[int, float]) -> float:
    """Slope of log y over log x, by least squares.

    >>> round(exponent({1: 3.0, 2: 12.0, 4: 48.0}), 6)
    2.0
    """
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


def upper_half(points: Mapping[int, float]) -> dict[int, float]:
    """The largest values, three at the least."""
    return dict(sorted(points.items())[-max(3, (len(points) + 1) // 2) :])


Found = dict[str, dict[int, Cost]]
"""Axis -> value -> the lowest cost."""


def measured(points: Mapping[tuple[str, int], Measure], repeats: int) -> Found:
    found: Found = {}
    for _ in range(repeats):
        for (axis, value), measure in points.items():
            cost = measure()
            best = found.setdefault(axis, {}).get(value, cost)
            found[axis][value] = Cost(min(best.wall, cost.wall), min(best.cpu, cost.cpu), cost.trials)
    return found


def table(found: Found) -> list[str]:
    lines = ["| axis | value | s a trial | CPU s a trial | exponent of the upper half |", "|---|---|---|---|---|"]
    for axis, costs in found.items():
        slope = exponent(upper_half(growth_of(costs)))
        for i, (value, cost) in enumerate(costs.items()):
            cells = [axis if not i else "", str(value), *(f"{x / cost.trials:.4f}" for x in (cost.wall, cost.cpu))]
            lines.append(f"| {' | '.join([*cells, '' if i else f'{slope:.2f}'])} |")
    return lines


def growth_of(costs: Mapping[int, Cost]) -> dict[int, float]:
    """CPU seconds of everything that is in flight."""
    return {value: cost.cpu for value, cost in costs.items()}


# ----- the picture -----


def picture(found: Found) -> str:
    """CPU seconds against the axis' value, both as multiples of the smallest one's, logarithmic; linear is dashed."""
    lines = {axis: growth_of(costs) for axis, costs in found.items()}
    curves = {
        axis: [(value / min(points), cpu / points[min(points)]) for value, cpu in sorted(points.items())]
        for axis, points in lines.items()
    }
    most = max(max(x, y) for curve in curves.values() for x, y in curve)
    doublings = math.ceil(math.log2(most))

    def x(value: float) -> float:
        return LEFT + (WIDE - LEFT - RIGHT) * math.log2(value) / doublings

    def y(value: float) -> float:
        return HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * max(0.0, math.log2(value)) / doublings

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDE}" height="{HIGH}" fill="white"/>',
    ]
    for exponent_of_2 in range(doublings + 1):
        at = 2**exponent_of_2
        parts.append(f'<path d="M{x(at):.1f} {y(1):.1f}V{TOP}M{LEFT} {y(at):.1f}H{WIDE - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{x(at):.1f}" y="{y(1) + 18:.1f}" text-anchor="middle">{at}x</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{at}x</text>')
    parts.append(
        f'<path d="M{x(1):.1f} {y(1):.1f}L{x(2**doublings):.1f} {y(2**doublings):.1f}" stroke="#9ca3af"'
        ' stroke-dasharray="4 4"/>'
    )
    for i, ((axis, curve), colour) in enumerate(zip(curves.items(), COLOURS)):
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in curve)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in curve]
        slope = exponent(upper_half(lines[axis]))
        at = WIDE - RIGHT + 12, TOP + 14 + 20 * i
        parts.append(f'<text x="{at[0]}" y="{at[1]}" fill="{colour}">{axis} ({slope:.2f})</text>')
    parts.append(
        f'<text x="{WIDE - RIGHT + 12}" y="{TOP + 24 + 20 * len(curves)}" fill="#6b7280">dashed: linear</text>'
    )
    middle = (LEFT + WIDE - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HIGH - 8}" text-anchor="middle">multiple of the smallest value</text>')
    parts.append(
        f'<text x="14" y="{HIGH / 2:.0f}" transform="rotate(-90 14 {HIGH / 2:.0f})" text-anchor="middle">CPU seconds of'
        " all trials in flight</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-table", action="store_true", help="print, and leave RESULTS.md and the picture alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        points = {
            (axis, value): on_a_random_model(Path(name), axis, value)
            for axis, values in AXES.items()
            for value in values
        }
        found = measured(points, arguments.repeats)
    lab = Lab()
    done = lab.search(seed=0, n_trials=max(IN_FLIGHT))
    edits = [Edit.from_dict(dict(trial.edit or {})) for trial in done.trials]
    found |= measured({(ORGANISM, k): on_the_organism(lab, edits, k) for k in IN_FLIGHT}, arguments.repeats)
    n = len(lab.prompts.target.validation)
    head = [
        "## How a trial's cost grows (`python benchmarks/growth.py`)",
        "",
        f"Random llama, {LAYERS} layers of width {WIDTH}, {LOAD.prompts} + {LOAD.prompts} prompts of"
        f" {LOAD.prompt_tokens} tokens, answers of {LOAD.response_tokens}, {AT_ONCE} trials in flight, but for the"
        f" axis; organism: {len(edits)} trials of a study, {n} + {len(lab.prompts.baseline.validation)} prompts,"
        f" default scorers. float32, one process, one thread, the lowest of {arguments.repeats} times in turns. The"
        " exponent is the slope of log(CPU s of all trials in flight) over log(value): 1 is linear. Picture:"
        " [docs/growth.svg](../docs/growth.svg).",
        "",
    ]
    text = "\n".join([*head, *table(found)])
    print(text)
    print(f"{time.process_time() - begun:.0f} CPU s in all")
    if not arguments.no_table:
        write_section("growth", text)
        PICTURE.write_text(picture(found))


if __name__ == "__main__":
    main()

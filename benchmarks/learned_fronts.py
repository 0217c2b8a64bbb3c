"""Searched and learned edits of a real model: what was saved, measured alike, and the fronts as a picture.

    python benchmarks/learned_fronts.py searched=RUN "learned, 8 answers=RUN" ... [--heretic FOLDER] [--prompts 40]

RUN is the folder of a `bruno-ray run smollm2 --behaviour disclaimers`, made with the options that `real_model.py` gives
(``--print-options`` prints them); if it has searched and trained, both kinds of trials are drawn. ``--model
NAME=FOLDER`` measures one more saved model. FOLDER of ``--heretic`` is one of heretic's in the cache that
`real_model.py` makes.

Every saved model is loaded and scored as `real_model.py` does it, so that the rows can stand beside its own. The
picture, `docs/learned-fronts.svg`, has each run's trials by what the search knew of them: the behaviour rate and the KL
at the first token, which is the only one that heretic measures. It is written by hand, as a few lines of SVG.
"""

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from real_model import BEHAVIOUR, DTYPE, MODEL, measure, metric_table, options
from results import write_section
from tool_runs import TrialFigures, from_json, front

from bruno_ray.model.named_models import named_folder
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings.sources import load
from bruno_ray.study.selection import load_trials
from bruno_ray.study.storage import load_study

PICTURE = Path(__file__).parent.parent / "docs" / "learned-fronts.svg"
HERETIC = "heretic 1.4.0"
COLOURS = ("#6b7280", "#2563eb", "#c2410c", "#0f766e", "#7c3aed")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 60, 20, 20, 50

Study = tuple[list[TrialFigures], int]
"""Completed trials, and the number of the selected one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--heretic", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="one more saved model")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--report-tokens", type=int, default=256)
    parser.add_argument("--note", default="", help="a paragraph for the section")
    parser.add_argument("--print-options", action="store_true", help="what to give `bruno-ray run`")
    parser.add_argument("--picture-only", action="store_true", help="measure nothing, draw what the studies know")
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    arguments = parser.parse_args()
    given = options(arguments)
    if arguments.print_options:
        print(shlex.join([MODEL, *given, "--model.dtypes", f'["{DTYPE}"]']))
        return
    studies: dict[str, Study] = {}
    folders: dict[str, str] = {}
    seconds: dict[str, float] = {}
    if arguments.heretic:
        result = json.loads((arguments.heretic / "result.json").read_text())
        result.pop("host")
        run = from_json(result)
        studies[HERETIC], folders[HERETIC] = (run.trials, run.selected.number), run.folder
        seconds[HERETIC] = run.trial_seconds * len(run.trials)
    for text in arguments.runs:
        name, folder = text.split("=", 1)
        found, folders[name], seconds[name] = own_study(Path(folder))
        studies |= {f"{name}, {kind}" if len(found) > 1 else name: study for kind, study in found.items()}
    folders |= dict(text.split("=", 1) for text in arguments.model)
    if arguments.picture_only:
        PICTURE.write_text(picture(studies))
        return
    settings = load([*given, "--model.dtypes", f'["{DTYPE}"]'], environ={}).settings
    prompts = load_prompts(settings)
    measured = measure(named_folder(MODEL), folders, settings, prompts)
    lines = [
        "## Learned edits of a real model (`benchmarks/learned_fronts.py`)",
        "",
        f"SmolLM2-135M-Instruct, preset `{BEHAVIOUR}`, {DTYPE}; what was saved, measured alike on"
        f" {len(prompts.target.test)} and {len(prompts.baseline.test)} test prompts; 95 % intervals (Wilson);"
        f" `kl_first` is at the first token, `kl_divergence` over 16. The evasion rate is 1 minus the rate of answers"
        " to the point.",
        "",
        *([arguments.note, ""] if arguments.note else []),
        *metric_table(measured),
        f"| seconds of all trials | {' | '.join(f'{seconds[n]:.0f}' if n in seconds else '' for n in measured)} |",
        "",
        "What the searches knew of their trials is drawn in [docs/learned-fronts.svg](../docs/learned-fronts.svg).",
    ]
    for i, prompt in enumerate(prompts.target.test[:4]):
        lines += ["", f"> {prompt.user}", ""]
        lines += [f"- {name}: {' '.join(each.answers[i].split())[:160]}" for name, each in measured.items()]
    text = "\n".join(lines).encode("ascii", "xmlcharrefreplace").decode()
    print(text)
    if not arguments.dry:
        PICTURE.write_text(picture(studies))
        write_section("learned_fronts", text)


def own_study(folder: Path) -> tuple[dict[str, Study], str, float]:
    """A run's completed trials, searched and learned ones apart; its saved model; the seconds that all trials took."""
    run = RunDirectory.open(folder)
    record = run.read()
    if record.selected is None:
        raise SystemExit(f"{folder}: no trial was selected")
    study = load_study(record.settings.study.storage, folder, record.settings.study.name)
    trials = [trial for trial in load_trials(study) if trial.state == "COMPLETE"]
    kinds: dict[str, list[TrialFigures]] = {}
    for t in trials:
        kind = "searched" if t.training is None else "learned"
        values = t.values["kl_first"], t.values["kl_divergence"]
        kinds.setdefault(kind, []).append(TrialFigures(t.number, *t.counts["behaviour_rate"], *values))
    seconds = sum(t.seconds or 0.0 for t in trials)
    chosen = record.selected.number
    later = folder / f"model-{chosen}"  # where another trial was saved before
    model = later if later.is_dir() else folder / "model"
    return {kind: (figures, chosen) for kind, figures in kinds.items()}, str(model), seconds


# ----- the picture -----


def picture(studies: Mapping[str, Study]) -> str:
    """Scatter of all trials with each study's front as a staircase and its choice ringed; KL on a logarithmic axis."""
    kls = [max(trial.kl_first, 1e-4) for trials, _ in studies.values() for trial in trials]
    decades = decades_of(kls)

    def x(kl: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * position(max(kl, 1e-4), decades)

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for exponent in range(decades[0], decades[1] + 1):
        at = x(10.0**exponent)
        parts.append(f'<path d="M{at:.1f} {y(1):.1f}V{y(0):.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{at:.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{10.0**exponent:g}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{LEFT} {y(share):.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">KL divergence at the first token</text>')
    middle = y(0.5)
    parts.append(
        f'<text x="14" y="{middle:.0f}" transform="rotate(-90 14 {middle:.0f})" text-anchor="middle">'
        "answers that show the behaviour</text>"
    )
    for i, ((name, (trials, selected)), colour) in enumerate(zip(studies.items(), COLOURS)):
        best = sorted((t for t in trials if t.number in front(trials, "kl_first")), key=lambda t: t.kl_first)
        steps = "".join(
            f"{'H' if k else 'M'}{x(t.kl_first):.1f}{'V' if k else ' '}{y(t.shown / t.total):.1f}"
            for k, t in enumerate(best)
        )
        parts.append(f'<path d="{steps}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for t in trials:
            at = f'cx="{x(t.kl_first):.1f}" cy="{y(t.shown / t.total):.1f}"'
            parts.append(f'<circle {at} r="2.5" fill="{colour}" fill-opacity="0.6"/>')
            if t.number == selected:
                parts.append(f'<circle {at} r="7" fill="none" stroke="{colour}" stroke-width="2"/>')
        top = TOP + 14 + 18 * i
        parts.append(f'<circle cx="{WIDTH - 190}" cy="{top - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - 180}" y="{top}">{name}</text>')
    parts.append(f'<text x="{WIDTH - 196}" y="{TOP + 14 + 18 * len(studies)}" fill="#6b7280">ringed: chosen</text>')
    return "\n".join([*parts, "</svg>", ""])


def decades_of(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of ten that enclose them."""
    exponents = [math.floor(math.log10(value)) for value in values]
    return min(exponents), max(exponents) + 1


def position(value: float, decades: tuple[int, int]) -> float:
    """Where it lies between them, 0 to 1, in its logarithm."""
    low, high = decades
    return (math.log10(value) - low) / (high - low)


if __name__ == "__main__":
    main()

"""What a short study makes of each preset on a real model: SmolLM2, unedited and edited, on test prompts.

    python benchmarks/preset_studies.py [over-refusal sycophancy ...] [--trials 16] [--tokens 64] [--only-table]

One study per preset in this process (``in_process.py``), searched, one thread, bfloat16, on fewer prompts than the
presets have; the pick is `--auto-select`'s by the search alone. It is then measured on test prompts, whose templates
are in no other part, applied live. What was measured is kept in the cache, preset by preset; ``--only-table`` writes
the table from there.
"""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from in_process import Lab
from methods_table import rate
from results import write_section

from bruno_ray.ablation.edit import Edit
from bruno_ray.files import cache_folder
from bruno_ray.model.named_models import named_folder
from bruno_ray.prompts.rendering import render

MODEL = "smollm2"
PRESETS = ("over-refusal", "sycophancy", "self-reference", "moralising", "hedging", "verbosity")
N_TRAIN, N_VALIDATION, N_TEST = 40, 24, 40
BESIDE = "baseline_behaviour"
"""Scorer: whether answers to baseline prompts show the behaviour."""

N_ANSWERS = 3
"""Answers side by side for each preset."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--startup", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--note", default="", help="a paragraph below the table")
    parser.add_argument("--only-table", action="store_true", help="write the table from what was measured before")
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = cache_folder("benchmark-presets")
    kept.mkdir(parents=True, exist_ok=True)
    if not options.only_table:
        for preset in options.presets:
            found = measure(preset, options)
            (kept / f"{preset}.json").write_text(json.dumps(found))
            print(row(preset, found), flush=True)
    known = {
        name: json.loads((kept / f"{name}.json").read_text()) for name in PRESETS if (kept / f"{name}.json").exists()
    }
    text = section(known, options)
    print(text)
    if not options.dry:
        write_section("preset_studies", text)


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the unedited and of the edited model on test prompts; answers to some of them."""
    start = time.process_time()
    given = ["--model.id", str(named_folder(MODEL)), "--behaviour", preset, "--model.dtypes", '["bfloat16"]']
    given += ["--prompts.n-train", str(N_TRAIN), "--prompts.n-validation", str(N_VALIDATION)]
    given += ["--prompts.n-test", str(N_TEST), "--prompts.n-finalists", "0"]
    given += ["--scoring.response-tokens", str(options.tokens), "--scoring.report-tokens", str(options.tokens)]
    lab = Lab(given)
    done = lab.search(seed=0, n_trials=options.trials, n_startup_trials=options.startup, trials_per_batch=1)
    trial = lab.pick(done).trial
    edit = Edit.from_dict(dict(trial.edit or {}))
    scoring = lab.settings.scoring.for_report(further=False)
    scoring = scoring.model_copy(update={"scorers": (*scoring.scorers, BESIDE)})
    bank = {name: torch.from_numpy(rows) for name, rows in lab.context.bank.items()}
    context = lab.context_of("test", bank, scoring=scoring)
    before = lab.worker.baseline(context)
    (after,) = lab.worker.evaluate(context, [edit])
    if after.scores is None:
        raise SystemExit(f"{preset}: {after.error}")
    some = lab.prompts.target.test[:N_ANSWERS]
    engine = lab.worker.engine
    edits = [None, *engine.editor.resolve_all([edit], bank)]
    answers = engine.generate(render(engine.tokenizer, some, date=lab.record.date), edits, options.tokens)
    return {
        "trial": trial.number,
        "seconds": time.process_time() - start,
        "validation": trial.counts["behaviour_rate"],
        "before": {"counts": before.counts, "values": before.values},
        "after": {"counts": after.scores.counts, "values": after.scores.values},
        "answers": [
            (prompt.user, unedited.text, edited.text) for prompt, unedited, edited in zip(some, *answers, strict=True)
        ],
    }


def section(found: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "## Presets on a real model (`benchmarks/preset_studies.py`)",
        "",
        f"SmolLM2-135M-Instruct, bfloat16, one thread; {options.trials} trials ({options.startup} at startup), all of"
        f" them searched; at most {N_TRAIN} prompts a side for directions, {N_VALIDATION} for validation and {N_TEST}"
        f" for the test; {options.tokens} answer tokens throughout; seed 0. Test prompts are of other templates; 95 %"
        " intervals (Wilson). Beside the request: answers that pass it by, repeat themselves or do not end, where the"
        " preset says what an answer must take up. KL is over 16 answer tokens of baseline prompts; CPU seconds are of"
        " the whole study, its preparation and the test included.",
        "",
        "| preset | shows the behaviour: unedited | edited | beside the request: unedited | edited | in baseline"
        " answers: unedited | edited | KL | incoherent | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(name, each) for name, each in found.items()),
    ]
    if options.note:
        lines += ["", options.note]
    for name, each in found.items():
        lines += ["", f"### {name}", "", "| prompt | unedited | edited |", "|---|---|---|"]
        lines += ["| " + " | ".join(map(cell, texts)) + " |" for texts in each["answers"]]
    return "\n".join(lines).encode("ascii", "xmlcharrefreplace").decode()


def row(name: str, found: Mapping[str, Any]) -> str:
    cells = []
    for metric in ("behaviour_rate", "evasion_rate", "baseline_behaviour_rate"):
        for side in ("before", "after"):
            counts = found[side]["counts"].get(metric)
            cells.append(rate(counts) if counts else "-")
    values = found["after"]["values"]
    cells += [f"{values['kl_divergence']:.4f}", f"{values['incoherence']:.2f}", f"{found['seconds']:.0f}"]
    return f"| `{name}` | {' | '.join(cells)} |"


def cell(text: str, longest: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= longest else f"{text[:longest]} ..."


if __name__ == "__main__":
    main()

"""League table: every direction method alone, several together, and trained edits, on models with a known truth.

    python benchmarks/methods.py own FOLDER ... --recipe PATH/make_organism.py [--fresh gemma2:3 qwen3:7:hard]
        [--smollm2 [--default-run RUN[:TRIAL]]] [--check] [--entries NAME ...] [--only-table]

`own` is the project's own organism; FOLDER and ``--fresh`` are as `organisms.py` takes them; ``--smollm2`` adds
SmolLM2 with the preset `disclaimers`, 40 prompts a side. Everything runs in this process (``in_process.py``), one
thread, without Ray: a model is loaded once, its residuals are read once for all methods, and eight edits are evaluated
in one batch. Each entry is one study with trial 0 of the literature; the pick is `--auto-select`'s, on organisms among
finalists that are measured again with long answers, on SmolLM2 by the search alone. All picks are then measured on
the test prompts together, applied live, which is the baked model (tested). Truth on organisms: right answers about
what is refused, as `truth.py` counts them, which no search sees; ``--check`` bakes one pick for each organism and asks
`truth.py` itself. heretic's rows are of its own runs with 60 trials in the cache of `organisms.py`, whose models are
measured with the same scorers; where there is none it runs now. The default study of SmolLM2, an hour on one core, is
that of a run of the product, ``--default-run``: its pick is measured beside the others'.

What was measured is kept in the cache, model by model; ``--only-table`` writes the table from there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from in_process import Done, Lab
from methods_table import HERETIC, LONG, RANK, Row, organism_table, real_table, section
from organisms import made, measured, organisms_in, truth_program
from results import write_section
from tested_models import JOINED, OWN, Foreign, Model, Own, SmolLM2, heretic_model

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.directions import METHODS
from bruno_ray.errors import BrunoError
from bruno_ray.files import cache_folder
from bruno_ray.learning.layer_effects import best_by_cosmic, best_by_effect, layer_effects
from bruno_ray.model.loading import load_model
from bruno_ray.python import Run
from bruno_ray.runs import lookup
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.settings import LearnedSettings, ModelSettings, StudySettings
from bruno_ray.study.starts import LITERATURE, Start, literature_edit
from bruno_ray.study.trainings import versions

WHOLE = "the default study"
DEFAULT = "difference_in_means"
SEVERAL = ("contrastive_pca", "subspace", "concept_cones", "self_organising_map")
"""Methods that give several directions; they get RANK of them."""

SAME = 0.999
"""Median cosine with the difference in means from which on a method is the same on a model."""

EFFECT_PROMPTS = 16
UNCHANGED = 1e-6
"""KL, nats: an entry none of whose trials has more changes nothing."""


@dataclass(frozen=True)
class Entry:
    """One study of the table."""

    name: str
    directions: tuple[tuple[str, Mapping[str, Any]], ...]
    """(prefix of the set's name, options of `build_bank`)."""

    trained: int = 0
    """Trials that are trained, at the end."""

    searched: int | None = None
    """Trials before them; as many as the model's studies have when not given."""

    start: str = ""
    """`causal` or `cosmic`: trial 1 is the literature's edit with the layer that this selection takes."""


def plain(name: str) -> tuple[str, Mapping[str, Any]]:
    return "", {"methods": (name,), "rank": RANK if name in SEVERAL else 1}


def entries(trainings: int, trained: int) -> list[Entry]:
    """Args:
    trainings: of the default study.
    trained: one more study ends with so many trained trials, if any.
    """
    means = plain(DEFAULT)
    found = [Entry(name, (plain(name),)) for name in METHODS]
    found += [
        Entry("difference_in_means, not projected", (("unprojected ", {"methods": (DEFAULT,), "projected": False}),)),
        Entry("difference_in_means, positions 0 to 3 joined", (("", {"methods": (DEFAULT,), "positions": JOINED}),)),
        Entry(
            "difference_in_means and its joined positions", (means, ("", {"methods": (DEFAULT,), "positions": JOINED}))
        ),
        Entry("all methods in one study", tuple(plain(name) for name in METHODS)),
        Entry("difference_in_means, layer by causal effect first", (means,), start="causal"),
        Entry("difference_in_means, layer by COSMIC first", (means,), start="cosmic"),
    ]
    found.append(Entry(f"difference_in_means, {LONG} searched trials", (means,), searched=LONG))
    last = trainings * versions(LearnedSettings())
    found.append(Entry(WHOLE, (means,), trained=last, searched=LONG - last))
    if trained:
        found.append(Entry(f"both: difference_in_means, then {trained} trained trials", (means,), trained=trained))
    return found


def measure(
    model: Model,
    wanted: Sequence[Entry],
    heretic: Path | None,
    program: Path | None,
    run: tuple[RunDirectory, int | None] | None = None,
) -> list[Row]:
    """All entries on one model; the first row is the unedited model's.

    Args:
        heretic: the model that it has saved.
        program: `truth.py`, to check one pick with.
        run: whose pick, or trial, is that of the default study.
    """
    lab, seconds = model.lab, {}
    banks: dict[str, DirectionBank] = {}
    known: dict[str, DirectionBank] = {}
    failed: dict[str, str] = {}
    for entry in wanted:
        start = time.process_time()
        try:
            banks[entry.name] = bank_of(lab, entry, known)
        except BrunoError as error:
            failed[entry.name] = str(error)
        seconds[entry.name] = time.process_time() - start
    union = {name: rows for bank in banks.values() for name, rows in bank.items()}
    done: dict[str, Done] = {}
    effects = {}
    for trains in (False, True):
        some = [entry for entry in wanted if entry.name in banks and bool(entry.trained) == trains]
        if not some:
            continue
        if trains:  # another set of scorers: edits are compared by how sure they leave the model as well
            study = lab.settings.study.model_copy(update={"method": "both"})
            lab.record = lab.record.model_copy(update={"settings": lab.settings.model_copy(update={"study": study})})
        lab.use(union, trains=trains)
        for entry in some:
            start = time.process_time()
            starts = []
            if entry.start:
                if not effects:
                    effects = effects_of(lab, banks[entry.name])
                    print(model.name, effects, flush=True)
                starts = [effects[entry.start]]
            done[entry.name] = study_of(model, entry, banks[entry.name], starts)
            seconds[entry.name] += time.process_time() - start
            print(f"{model.name}: {entry.name}, {seconds[entry.name]:.0f} CPU s", flush=True)
    trained = {name: torch.from_numpy(each.directions) for one in done.values() for name, each in one.trained.items()}
    whole = union | trained
    chosen: dict[str, Edit] = {}
    for name, one in done.items():
        start = time.process_time()
        try:
            choice = lab.pick(one, whole if model.again else None)
            chosen[name] = Edit.from_dict(dict(choice.trial.edit or {}))
        except BrunoError as error:
            failed[name] = str(error)
        seconds[name] += time.process_time() - start
    if run is not None:
        product, number = Run(run[0]), run[1]
        edit, timings = product.edit(number), product.record.timings
        chosen[WHOLE] = replace(edit, direction_set=f"{WHOLE}: {edit.direction_set}")
        whole |= {f"{WHOLE}: {name}": rows for name, rows in product.directions().items()}
        seconds[WHOLE] = timings["study"] + timings["finalists"]
    rows = test(model, whole, chosen, seconds, heretic)
    for row in rows:
        if row.entry in done:
            row.notes += notes(done[row.entry], banks[row.entry], union, row.entry)
        if row.entry == DEFAULT and program is not None and isinstance(model, Foreign):
            row.notes.append(by_its_own_program(model, program, whole, chosen[row.entry]))
    return rows + [
        Row(name, (0, 0), None, None, None, 0.0, 0.0, 0.0, [f"failed: {why}"]) for name, why in failed.items()
    ]


def bank_of(lab: Lab, entry: Entry, known: dict[str, DirectionBank]) -> DirectionBank:
    """The entry's direction sets. What was computed for an earlier entry is taken from there."""
    bank = {}
    for prefix, options in entry.directions:
        key = json.dumps([prefix, options], default=list, sort_keys=True)
        if key not in known:
            joined = "positions" in options
            found = lab.bank(**options, joined=joined)
            known[key] = {prefix + name: rows for name, rows in found.items() if not joined or "+" in name}
        bank |= known[key]
    return bank


def study_of(model: Model, entry: Entry, bank: DirectionBank, starts: Sequence[Start]) -> Done:
    return model.lab.search(
        seed=1,
        n_trials=(model.n_trials if entry.searched is None else entry.searched) + entry.trained,
        sets=list(bank),
        starts=starts,
        n_startup_trials=model.n_startup if entry.searched is None else StudySettings().n_startup_trials,
        method="both" if entry.trained else "searched",
        learned={"trials": entry.trained},
    )


def effects_of(lab: Lab, bank: DirectionBank) -> dict[str, Start]:
    """Selection -> the literature's edit with the layer that it takes."""
    engine, info = lab.worker.engine, lab.info
    sides = lab.prompts.target.train[:EFFECT_PROMPTS], lab.prompts.baseline.train[:EFFECT_PROMPTS]
    rendered = ScoringPrompts.rendered(engine, *sides, date=lab.record.date)
    unedited = Evaluation(engine, rendered, lab.settings.scoring, whole=True)
    edit = literature_edit(list(bank), info.n_layers, info.components)
    found = layer_effects(unedited, bank, edit)
    picks = {"causal": best_by_effect(found), "cosmic": best_by_cosmic(found)}
    return {
        name: Start(replace(edit, direction_index=float(effect.layer)), f"{name}: layer {effect.layer}")
        for name, effect in picks.items()
    }


def test(
    model: Model, bank: DirectionBank, chosen: Mapping[str, Edit], seconds: Mapping[str, float], heretic: Path | None
) -> list[Row]:
    """Every pick, and the unedited model, on the test prompts."""
    lab = model.lab
    scoring = lab.settings.scoring.for_report(further=False)
    context = lab.context_of("test", bank, scoring=scoring)
    names, edits = list(chosen), list(chosen.values())
    unedited = lab.worker.baseline(context)
    outcomes = lab.worker.evaluate(context, edits)
    resolved = lab.worker.engine.editor.resolve_all(edits, bank)
    truths = model.truth([None, *resolved])
    rows = [row_of("unedited", unedited, truths[0], 0.0)]
    for name, outcome, truth in zip(names, outcomes, truths[1:]):
        if outcome.scores is not None:
            rows.append(row_of(name, outcome.scores, truth, seconds[name]))
    if heretic is not None:
        other = lab.settings.model.model_copy(update={"id": str(heretic)})
        scores = lab.worker.measure_other(context, other)  # the worker has another model from here on
        rows.append(row_of(HERETIC, scores, model.truth([None])[0], 0.0))
    return rows


def row_of(name: str, scores: Any, truth: tuple[tuple[int, int], tuple[int, int]] | None, seconds: float) -> Row:
    return Row(
        name,
        scores.counts["behaviour_rate"],
        truth and truth[0],
        truth and truth[1],
        scores.counts.get("evasion_rate"),
        scores.values["kl_divergence"],
        scores.values["incoherence"],
        seconds,
    )


def notes(done: Done, bank: DirectionBank, union: DirectionBank, name: str) -> list[str]:
    found = []
    complete = [trial for trial in done.trials if trial.state == "COMPLETE"]
    if all(trial.values["kl_divergence"] < UNCHANGED for trial in complete):
        found.append("changes nothing")
    means = union.get(f"{DEFAULT}@0")
    if means is not None and len(bank) == 1 and name in METHODS and name != DEFAULT:
        (rows,) = bank.values()
        empty = int((rows[1:, 0] == 0).all(-1).sum())
        if empty:
            found.append(f"nothing at {empty} of {len(rows) - 1} layers")
        cosine = float((rows[1:, 0] * means[1:, 0]).sum(-1).abs().median())
        which = "first direction: " if name in SEVERAL else ""
        same = ": the same" if cosine > SAME and not which else ""
        found.append(f"{which}cosine {cosine:.2f} with the difference in means{same}")
    for number, trial in enumerate(complete[:2]):
        if trial.origin:
            what = "trial 0" if trial.origin == LITERATURE else f"trial {number}, {trial.origin}"
            shown, total = trial.counts["behaviour_rate"]
            found.append(f"{what}: {shown}/{total}, KL {trial.values['kl_divergence']:.3f}")
    return found


def by_its_own_program(model: Foreign, program: Path, bank: DirectionBank, edit: Edit) -> str:
    """Facts of a baked pick by `truth.py` itself, as a note."""
    with tempfile.TemporaryDirectory() as work:
        loaded = load_model(ModelSettings(id=str(model.folder), dtypes=("float32",)))
        bake(loaded.architecture, edit, bank)
        loaded.model.save_pretrained(work)
        loaded.tokenizer.save_pretrained(work)
        truth = measured(program, model.folder, work)["after"]
    return f"baked, by truth.py: {truth.hidden} hidden and {truth.benign} benign facts, KL {truth.kl:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", help="`own`, and folders of organisms")
    parser.add_argument("--recipe", type=Path, help="program that makes organisms: FAMILY FOLDER")
    parser.add_argument("--fresh", nargs="+", default=[], metavar="FAMILY:SEED[:hard]")
    parser.add_argument("--truth", type=Path, help="truth.py, if it lies elsewhere")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--default-run", help="of SmolLM2, RUN or RUN:TRIAL: takes the place of its default study")
    parser.add_argument("--entries", nargs="+", help="only entries of these names")
    parser.add_argument(
        "--trained", type=int, default=0, help="one more entry on organisms, with this many trained trials"
    )
    parser.add_argument("--check", action="store_true", help="ask truth.py itself about one baked pick a model")
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md alone")
    parser.add_argument("--note", default="", help="a paragraph after the tables")
    parser.add_argument("--only-table", action="store_true", help="write the table from what was measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = cache_folder("benchmark-methods")
    kept.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        folders = [folder for given in arguments.subjects if given != OWN for folder in organisms_in(Path(given))]
        folders += [made(arguments.recipe, name) for name in arguments.fresh]
        makers: list[tuple[Callable[[], Model], Path | None]] = [(Own, None)] if OWN in arguments.subjects else []
        makers += [(lambda folder=folder: Foreign(folder), heretic_model(folder)) for folder in folders]
        makers += [(SmolLM2, None)] if arguments.smollm2 else []
        for make, heretic in makers:
            model = make()
            real = isinstance(model, SmolLM2)
            wanted = entries(model.trainings, 0 if real else arguments.trained)
            if arguments.entries:
                wanted = [entry for entry in wanted if entry.name in arguments.entries]
            run = lookup.find_trial(arguments.default_run) if real and arguments.default_run else None
            if run is not None:
                wanted = [entry for entry in wanted if entry.name != WHOLE]
            program = truth_program(model.folder, arguments) if arguments.check and isinstance(model, Foreign) else None
            rows = measure(model, wanted, heretic, program, run)
            file = kept / f"{model.name}.json"
            before = json.loads(file.read_text()) if file.exists() else []
            names = {row.entry for row in rows}
            merged = [row for row in before if row["entry"] not in names] + [asdict(row) for row in rows]
            file.write_text(json.dumps(merged))
            print("\n".join((real_table if isinstance(model, SmolLM2) else organism_table)(rows)), flush=True)
    found = {file.stem: [Row(**row) for row in json.loads(file.read_text())] for file in sorted(kept.glob("*.json"))}
    text = "\n\n".join(filter(None, [section(found), arguments.note]))
    print(text)
    if not arguments.dry:
        write_section("methods", text)


if __name__ == "__main__":
    main()

"""Models, trials, saved folders and servers on the same test prompts: `bruno-ray compare`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bruno_ray.ablation.edit import SHIFTS, Edit
from bruno_ray.errors import OutputError, SettingsError
from bruno_ray.files import expanded, output_errors, write_text
from bruno_ray.pipeline.answering import ask_for_answers
from bruno_ray.pipeline.choosing import trials_of
from bruno_ray.pipeline.steps import evaluation_context, find_model, for_workers, known_response_prefix, worker_pool
from bruno_ray.progress import phase
from bruno_ray.prompts.sets import Prompts, load_prompts
from bruno_ray.publishing.card import behaviour_name
from bruno_ray.publishing.side_by_side import Contestant, SideBySide, render_page
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.lookup import run_named
from bruno_ray.runs.records import RunRecord, ScoresRecord
from bruno_ray.scoring.chat_server import ChatServer
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.scores import Answer, ComparedScores, Scores
from bruno_ray.settings import ModelSettings, ScoringSettings, Settings
from bruno_ray.settings.source_values import SourceValues
from bruno_ray.settings.sources import apply
from bruno_ray.study import selection
from bruno_ray.workers.exchanged import ComparedEdits
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)

SCORERS = ("behaviour_rate", "kl_divergence", "to_the_point", "baseline_behaviour")


@dataclass(frozen=True)
class Served:
    """A model behind a server with OpenAI's API: MODEL@URL."""

    model: str
    url: str


@dataclass(frozen=True)
class Loadable:
    """A model to load, or a trial of a run."""

    run: RunDirectory | None = None
    trial: int | None = None
    """None: the selected one."""

    model: str = ""


@dataclass(frozen=True)
class _Edited:
    """A loadable as what has to be computed."""

    model: ModelSettings
    edit: Edit | None = None
    bank: dict | None = None


def parse_reference(text: str) -> Served | Loadable:
    """RUN, RUN:TRIAL, a model by id, name or folder, or MODEL@URL. Raises as ``runs.lookup``."""
    model, at, url = text.partition("@")
    if at and url.startswith(("http://", "https://")):
        if not model:
            raise SettingsError(f"command line: {text} names no model; write MODEL@{url}")
        return Served(model, url)
    if (found := run_named(text)) is not None:
        return Loadable(*found)
    if text.endswith(("/", ".gguf")) or expanded(text).exists() or "/" in text or ":" not in text:
        return Loadable(model=text)
    raise OutputError(f"{text} is no run here, no model and no server: give RUN:TRIAL, a model, or MODEL@URL")


def compare(
    references: Sequence[str],
    settings: Settings | None,
    overrides: SourceValues,
    to: Path,
    key_variable: str | None = None,
    timeout: float = 120.0,
) -> SideBySide:
    """Measure all on the same test prompts, and write the page.

    Args:
        references: what `parse_reference` reads, two or more.
        settings: prompts and markers; None takes those of the first run, with ``overrides`` in place.
        to: the page, replaced if it is there.
        key_variable: environment variable with the key of the servers.

    Raises:
        BrunoError: a subclass of it; nothing is written then.
    """
    asked = [parse_reference(text) for text in references]
    first_run = next((one.run for one in asked if isinstance(one, Loadable) and one.run), None)
    if settings is None:
        if first_run is None:
            raise SettingsError("command line: no run among them; say with --behaviour or --config what to ask them")
        settings = apply(first_run.read().settings, overrides)
    loadable = [one for one in asked if isinstance(one, Loadable)]
    edited = {one: _edited(one, settings) for one in loadable}
    settings = _for_comparison(settings, edited[loadable[0]].model if loadable else None)
    prompts = load_prompts(settings)
    given = {}
    for one in asked:
        if isinstance(one, Served):  # asked first: what cannot be reached is said before a model is loaded
            given[one] = _ask(one, prompts, settings, key_variable, timeout)
    found: dict[Loadable | Served, ComparedScores] = {}
    if loadable:
        record = _record(settings, [(one.run, edited[one].model) for one in loadable], first_run)
        measured = _measure(record, prompts, [edited[one] for one in loadable], list(given.values()))
        found |= dict(zip([*loadable, *given], measured))
    else:
        found |= {one: _by_markers(answers, prompts, settings) for one, answers in given.items()}
    names = _names(references)
    contestants = [
        Contestant(name, ScoresRecord.of(found[one].scores), found[one].target, found[one].baseline)
        for name, one in zip(names, asked)
    ]
    reference = names[asked.index(loadable[0])] if loadable else ""
    result = SideBySide(behaviour_name(settings), reference, contestants, prompts.target.test, prompts.baseline.test)
    with output_errors(to):
        write_text(to, render_page(result))
    return result


def _record(
    settings: Settings, asked: Sequence[tuple[RunDirectory | None, ModelSettings]], first_run: RunDirectory | None
) -> RunRecord:
    """With the date of the first run, and what is known of how the first model's answers begin."""
    of_first = _key(asked[0][1])
    known = next((run for run, model in asked if run is not None and _key(model) == of_first), None)
    if known is not None:
        return known.read().model_copy(update={"settings": settings})
    record = RunRecord(settings=settings)
    return record.model_copy(update={"date": first_run.read().date}) if first_run else record


def _names(references: Sequence[str]) -> list[str]:
    """Without folders of this machine, as long as they stay apart."""
    short = [text if "@" in text else text.rstrip("/").rpartition("/")[2] or text for text in references]
    return short if len(set(short)) == len(short) else list(references)


def _for_comparison(settings: Settings, model: ModelSettings | None) -> Settings:
    scoring = settings.scoring.model_copy(
        update={"scorers": SCORERS, "report_scorers": (), "objectives": ("behaviour_rate", "kl_divergence")}
    )
    # Without the judge: it would read answers of models that it was not set up for.
    scoring = scoring.model_copy(update={"judge": ScoringSettings().judge})
    return settings.model_copy(update={"scoring": scoring, **({"model": model} if model else {})})


def _edited(one: Loadable, settings: Settings) -> _Edited:
    """Raises OutputError if no trial of the run is selected, StudyError if there is none of that number."""
    if one.run is None:
        model = settings.model.model_copy(update={"id": one.model, "gguf_file": None, "revision": None})
        return _Edited(find_model(settings.model_copy(update={"model": model})).model)
    record = one.run.read()
    if one.trial is not None:
        edit = selection.find_trial(trials_of(one.run.path, record.settings), one.trial).edit
    elif record.selected is not None:
        edit = record.selected.edit
    else:
        raise OutputError(f"no trial of {one.run.name} is selected: name one, such as {one.run.name}:0")
    assert edit is not None
    # Two runs may have other directions under one name.
    own = f"{one.run.path}:{edit['direction_set']}"
    bank = one.run.load_directions()
    mine = {own: bank[edit["direction_set"]]} | ({f"{own}:{SHIFTS}": bank[SHIFTS]} if SHIFTS in bank else {})
    return _Edited(record.settings.model, replace(Edit.from_dict(edit), direction_set=own), mine)


def _measure(
    record: RunRecord,
    prompts: Prompts,
    edited: Sequence[_Edited],
    given: Sequence[tuple[list[Answer], list[Answer]]],
) -> list[ComparedScores]:
    """Those of ``edited``, in their order, then those of ``given``."""
    models = [_key(one.model) for one in edited]
    groups = {model: [k for k, other in enumerate(models) if other == model] for model in dict.fromkeys(models)}
    (own, *others) = groups.values()
    settings = record.settings
    with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
        pool.wait_ready()
        prefix = known_response_prefix(record, prompts, pool)
        record = record.model_copy(update={"response_prefix": prefix})
        pool.set_context(evaluation_context(record, prompts, "test", _merged(edited, own)))
        others_edits = [
            ComparedEdits(
                for_workers(edited[group[0]].model),
                tuple(edited[k].edit for k in group),
                {name: directions.numpy() for name, directions in _merged(edited, group).items()},
            )
            for group in others
        ]
        with phase("comparing", pool.progress):
            mine, theirs, texts = pool.call(
                "compare", [edited[k].edit for k in own], others_edits, list(given), with_context=True
            )
    found = {
        k: scores for group, of_group in zip((own, *others), (mine, *theirs)) for k, scores in zip(group, of_group)
    }
    return [*(found[k] for k in range(len(edited))), *texts]


def _key(model: ModelSettings) -> str:
    """Models that are one copy in memory."""
    return for_workers(model).model_dump_json(include={"id", "gguf_file", "revision", "quantization", "dtypes"})


def _merged(edited: Sequence[_Edited], group: Sequence[int]) -> dict:
    return {name: directions for k in group for name, directions in (edited[k].bank or {}).items()}


def _ask(
    one: Served, prompts: Prompts, settings: Settings, key_variable: str | None, timeout: float
) -> tuple[list[Answer], list[Answer]]:
    server = ChatServer("the server", one.url, one.model, key_variable, timeout, CONCURRENCY, OPTIONS.__getitem__)
    logger.info("asking %s at %s", one.model, one.url)
    target, baseline = (
        ask_for_answers(server, side.test, settings.scoring.report_tokens)
        for side in (prompts.target, prompts.baseline)
    )
    return target, baseline


CONCURRENCY = 4
OPTIONS = {
    "url": "the address behind the @",
    "model": "the name before it",
    "key_variable": "--key-variable",
    "timeout": "--timeout",
    "concurrency": "the load of the server",
}
"""What the server's settings are called here."""


def _by_markers(answers: tuple[list[Answer], list[Answer]], prompts: Prompts, settings: Settings) -> ComparedScores:
    """Where there are only servers: no model is loaded, and markers read the answers."""
    markers = Markers(settings.scoring.markers, settings.scoring.empty_counts)
    target, baseline = (tuple(text for text, _ in side) for side in answers)
    rates = [
        Scores.of_rate(metric, [markers.shown_by(text) for text in side])
        for metric, side in (("behaviour_rate", target), ("baseline_behaviour_rate", baseline))
    ]
    return ComparedScores(Scores.merged(rates), target, baseline)

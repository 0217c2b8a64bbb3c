"""The steps of a run up to the study, each spread over the pool's workers. What follows is in ``finishing.py``.

Every step notes in run.json what it found and how long it took.
"""

import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from bruno_ray import organism, plugins
from bruno_ray.ablation.edit import ADDITION, OPENED, SHIFTS, direction_sets_of
from bruno_ray.errors import SettingsError, StudyError
from bruno_ray.files import cache_folder
from bruno_ray.model.coverage_table import format_coverage
from bruno_ray.model.locating import locate, require_there
from bruno_ray.prompts.sets import PARTS, Prompt, Prompts
from bruno_ray.prompts.slicing import spread
from bruno_ray.residuals.store import ResidualStore, residual_key
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, ScoresRecord, installed_versions
from bruno_ray.scoring.judge import METRICS
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ModelSettings, ResidualSettings, ScoringSettings, Settings
from bruno_ray.settings.passwords import without_password
from bruno_ray.study.fingerprint import same_model
from bruno_ray.workers.exchanged import EvaluationContext, ModelInfo, TrainingPrompts, model_worker
from bruno_ray.workers.joining import cluster_address
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import cpus_per_worker
from bruno_ray.workers.shipping import Folders, absolute_if_folder

if TYPE_CHECKING:
    from torch import Tensor

    from bruno_ray.ablation.closed_forms import DirectionBank

logger = logging.getLogger(__name__)

OFTEN = 0.5
"""Share of the target prompts that should show the behaviour before anything is edited."""

OPENING_PROMPTS = 64
"""Baseline prompts whose answers show how such answers begin."""

PREFIX_PROMPTS = 32
"""Prompts a side whose answers are compared for a common beginning."""


def find_model(settings: Settings) -> Settings:
    """A folder by its full path, which means the same wherever a worker runs and wherever the run goes on.

    `organism` and `organism-hard` as model ids name the embedded organisms, trained on first use. Raises ModelError for
    a folder that is not there or holds no model, where workers see the folders of this machine.
    """
    name = absolute_if_folder(settings.model.id)
    match = re.fullmatch(r"organism(?:-(\w+))?", name)
    if match is not None:
        name = str(organism.build(recipe=match[1] or "standard") / "model")
    elif cluster_address(settings.ray) is None:
        require_there(settings.model)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"id": name})})


def with_plugins(settings: Settings) -> Settings:
    """What lies in files by paths that workers, and commands given elsewhere, find it under."""
    directions, scoring = settings.directions, settings.scoring
    directions = directions.model_copy(update={"methods": plugins.absolute(directions.methods)})
    given: dict[str, Any] = {name: plugins.absolute(getattr(scoring, name)) for name in ("scorers", "report_scorers")}
    if scoring.judge.plugin is not None:
        (plugin,) = plugins.absolute([scoring.judge.plugin])
        given["judge"] = scoring.judge.model_copy(update={"plugin": plugin})
    if scoring.classifier.model:
        model = absolute_if_folder(scoring.classifier.model)
        given["classifier"] = scoring.classifier.model_copy(update={"model": model})
    return settings.model_copy(update={"directions": directions, "scoring": scoring.model_copy(update=given)})


def plugin_hashes(settings: Settings) -> dict[str, str]:
    """ "plugin NAME" -> a hash of its source, of every method and scorer that is not part of this package."""
    scorers = (*settings.scoring.scorers, *settings.scoring.report_scorers)
    found = plugins.digests("directions.methods", settings.directions.methods)
    found |= plugins.digests("scoring.scorers", scorers)
    return {f"plugin {name}": digest for name, digest in found.items()}


def judge_hash(settings: Settings) -> dict[str, str]:
    """The same of a judge, which a run that is gone on with may replace."""
    names = [settings.scoring.judge.plugin] if settings.scoring.judge.plugin else []
    found = plugins.digests("scoring.judge.plugin", names)
    return {f"plugin {name}": digest for name, digest in found.items()}


def with_name(settings: Settings) -> Settings:
    """Give the study a name if it has none: model, behaviour, and a hash of what its results depend on."""
    if settings.study.name:
        return settings
    deciding = {"model", "behaviour", "prompts", "residuals", "directions", "search", "scoring"}
    given = settings.model_dump_json(include=deciding, exclude={"model": {"lean_forward"}, "scoring": {"judge"}})
    digest = hashlib.sha256(f"{given} {settings.study.seed}".encode())
    folder = Path(settings.model.id)
    model = folder.parent.name if folder.name == "model" else folder.name
    model = model.removesuffix(".gguf")
    name = f"{model}-{Path(settings.behaviour).stem}-{digest.hexdigest()[:6]}"
    return settings.model_copy(update={"study": settings.study.model_copy(update={"name": name})})


def worker_pool(settings: Settings, workers: int | None = None) -> WorkerPool:
    """`ray.workers` copies of the model, or another number of them."""
    ray = settings.ray if workers is None else settings.ray.model_copy(update={"workers": workers})
    threads = max(1, int(cpus_per_worker(ray)))
    return WorkerPool(model_worker, (for_workers(settings.model), threads, Folders(), True), ray)


def for_workers(model: ModelSettings) -> ModelSettings:
    """The model by the full path of its folder here, which workers elsewhere copy, or by its id on the hub."""
    located = locate(model)
    return located.model_copy(update={"id": absolute_if_folder(located.id)})


def open_run(settings: Settings, path: Path, info: ModelInfo, prompts: Prompts) -> RunDirectory:
    """The run directory: made now that prompts and model are known to be good, or opened to go on.

    Raises StudyError if it was begun with another model; nothing is written then.
    """
    run = RunDirectory.create(
        path, RunRecord(settings=settings, command=[without_password(word) for word in sys.argv]), resume=True
    )
    hashes, sources = run.read().hashes, plugin_hashes(settings)
    changed = [name for name, digest in sources.items() if hashes.get(name, digest) != digest]
    if changed:
        raise StudyError(f"{run.name} was begun with another source of {changed[0]}: put it back, or start a new run")
    before = hashes.get("model", info.fingerprint)
    if not same_model(before, info.fingerprint):
        raise StudyError(
            f"{run.name} was begun with another model than the one at {settings.model.id}, whose content differs: give"
            " the place of the same files with --model.id, or start a new run"
        )
    run.update(
        settings=settings,
        versions=installed_versions(),
        hashes={"model": info.fingerprint, "prompts": prompts.fingerprint, **sources, **judge_hash(settings)},
        seeds={"study": settings.study.seed},
        model={name: value for name, value in asdict(info).items() if name not in ("coverage", "further")},
        left_out=left_out(settings, info),
        coverage=[asdict(row) for row in info.coverage],
        prompts={
            side: {part: len(getattr(getattr(prompts, side), part)) for part in PARTS}
            for side in ("target", "baseline")
        }
        | ({"protect": {name: len(each) for name, each in prompts.protect.items()}} if prompts.protect else {}),
    )
    return run


def asked_beside(settings: Settings) -> list[str]:
    """What is to be edited beside all that writes, by the names of `ModelInfo.further`."""
    search = settings.search
    chosen = [name for name in ("experts", "heads") if set(getattr(search, name)) != {"all"}]
    return list(dict.fromkeys([*search.further, *chosen, *search.require]))


def left_out(settings: Settings, info: ModelInfo) -> dict[str, str]:
    """What is asked for and this model has no place for -> why."""
    reasons = {name: info.further.get(name, "") for name in asked_beside(settings)}
    return {name: reason for name, reason in reasons.items() if reason}


def require_places(settings: Settings, info: ModelInfo) -> None:
    """Say what this model has no place for. Raises SettingsError where `search.require` names it."""
    for name, reason in left_out(settings, info).items():
        if name in settings.search.require:
            raise SettingsError(
                f"{settings.model.id} has no place for {name} edits ({reason}), and search.require asks for them: use"
                " another model, or take it out of search.require"
            )
        logger.warning("%s edits are left out: this model has no place for them (%s)", name, reason)


HEAD_PROMPTS = 32
"""Prompts a side that attention heads are chosen with."""


def choose_parts(
    run: RunDirectory, info: ModelInfo, prompts: Prompts, bank: "DirectionBank", pool: WorkerPool
) -> RunRecord:
    """Note in run.json which experts and heads edits keep to, where the settings ask for some. They are chosen once."""
    record = run.read()
    search, prefix = record.settings.search, (record.response_prefix, record.date)
    found: dict[str, Any] = {}
    wanted = [
        (name, how)
        for name in ("experts", "heads")
        for how in getattr(search, name)
        if how != "all" and not info.further.get(name, "unknown") and f"{name}:{how}" not in record.choices
    ]
    if not wanted:
        return record
    from bruno_ray.generation.parts import chosen_heads, target_experts

    for name, how in wanted:
        if name == "experts":
            sides = [pool.call("routing", side.train, *prefix) for side in (prompts.target, prompts.baseline)]
            component, parts = "mlp", target_experts(*sides)
        else:
            directions = bank[direction_sets_of(bank)[0]].numpy()
            some = [spread(side.train, HEAD_PROMPTS) for side in (prompts.target, prompts.baseline)]
            scores = pool.call("head_scores", how, *some, *prefix, directions)
            component, parts = "attention", chosen_heads(scores, search.heads_share)
        found[f"{name}:{how}"] = {component: parts}
        chosen = [part for part in parts if part is not None]
        logger.info("%s %s: %d of them are edited, in %d layers", name, how, sum(map(len, chosen)), len(chosen))
    return run.update(choices=found)


def describe_model(settings: Settings, pool: WorkerPool) -> ModelInfo:
    """What was loaded, and which share of it the edit reaches: printed before anything is computed."""
    info: ModelInfo = pool.call("describe")
    logger.info(
        "%s: %s, %d layers of width %d, %.3g parameters, %s on %s",
        *(settings.model.id, info.family, info.n_layers, info.d_model, info.n_parameters, info.dtype, info.device),
    )
    logger.info("what the edit can reach of the parameters that write to the residual stream:")
    for line in format_coverage(list(info.coverage)).splitlines():
        logger.info("  %s", line)
    return info


def find_response_prefix(record: RunRecord, prompts: Prompts, pool: WorkerPool) -> str:
    """`prompts.response_prefix`, or what all answers of the unedited model begin with."""
    if record.settings.prompts.response_prefix != "auto":
        return record.settings.prompts.response_prefix
    some = [*spread(prompts.target.train, PREFIX_PROMPTS), *spread(prompts.baseline.train, PREFIX_PROMPTS)]
    prefix = pool.call("response_prefix", some, record.date)
    if prefix:
        logger.info("every answer begins with %r: made part of the prompts", prefix)
    return prefix


def known_response_prefix(record: RunRecord, prompts: Prompts, pool: WorkerPool) -> str:
    """The run's, which may be known to be empty; of settings alone it is looked for."""
    if "response_prefix" in record.timings:
        return record.response_prefix
    return find_response_prefix(record, prompts, pool)


def find_opening(record: RunRecord, prompts: Prompts, pool: WorkerPool) -> tuple[int, ...]:
    """Tokens that answers are made to begin with where directions are read behind a baseline answer's beginning.

    Raises SettingsError if no baseline answer is without the behaviour.
    """
    some = spread(prompts.baseline.train, OPENING_PROMPTS)
    tokens, text = pool.call("opening", some, record.response_prefix, record.date, record.settings.scoring)
    if not tokens:
        raise SettingsError(
            "directions.opened_positions: answers to baseline prompts are empty or all marked, so none shows how to"
            " begin one; set scoring.compliant_opening, or leave directions.opened_positions out"
        )
    logger.info("directions are also read in answers that begin with %r", text)
    return tokens


def read_residuals(
    record: RunRecord,
    info: ModelInfo,
    prompts: Sequence[Prompt],
    pool: WorkerPool,
    residuals: ResidualSettings,
    opening: tuple[int, ...] = (),
) -> Float[np.ndarray, "prompt position point d_model"]:
    """Residuals of all prompts: from the store, and what is missing there from the workers, shard by shard.

    ``opening``: tokens that every answer is made to begin with.
    """
    opened = {"opening": " ".join(map(str, opening))} if opening else {}
    key = residual_key(
        info.fingerprint,
        # As the model reads them: a template may put more into a prompt than its texts, the date for one.
        pool.call("rendered", prompts, record.response_prefix, record.date),
        dtype=info.dtype,
        quantization=record.settings.model.quantization,
        max_tokens=residuals.max_tokens,
        answer_tokens=residuals.answer_tokens,
        **opened,
    )
    store = ResidualStore(residuals.cache_dir or cache_folder("residuals"), key, len(prompts))
    missing = store.missing()
    if len(missing) < len(store.shards):
        logger.info("residuals of %d of %d shards are on disk", len(store.shards) - len(missing), len(store.shards))
    calls = [
        (prompts[shard.start : shard.stop], record.response_prefix, record.date, residuals, opening)
        for shard in missing
    ]
    for index, array in pool.map_shards("residuals", calls):
        store.write(missing[index], array)
    return store.read()


def find_directions(
    run: RunDirectory, record: RunRecord, info: ModelInfo, prompts: Prompts, pool: WorkerPool
) -> "DirectionBank":
    """The direction bank of the run, kept there once it is found."""
    if run.directions_file.exists():
        return run.load_bank()
    bank, geometry = read_bank(record, info, prompts, pool)
    run.save_geometry(geometry)
    run.save_directions(bank)
    return bank


def read_bank(
    record: RunRecord, info: ModelInfo, prompts: Prompts, pool: WorkerPool
) -> "tuple[DirectionBank, dict[str, Any]]":
    """Every method at every position of the train prompts' residuals, and what the report shows of these."""
    from bruno_ray.directions import build_bank
    from bruno_ray.directions.protected import protect
    from bruno_ray.publishing.plots import geometry_record

    chosen = record.settings.directions
    opening = find_opening(record, prompts, pool) if chosen.opened_positions else ()
    target_NPLD, baseline_NPLD = (
        _residuals(record, info, side.train, pool, opening) for side in (prompts.target, prompts.baseline)
    )
    places = {str(position): position for position in chosen.positions}
    last = record.settings.residuals.answer_tokens
    places |= {f"{OPENED}{position}": last + position for position in chosen.opened_positions}
    bank = build_bank(
        target_NPLD,
        baseline_NPLD,
        methods=chosen.methods,
        positions=places,
        rank=chosen.rank,
        projected=chosen.projected,
        winsorize_quantile=chosen.winsorize_quantile,
        joined=chosen.joined,
    )
    geometry = geometry_record(target_NPLD[:, 0], baseline_NPLD[:, 0])
    if prompts.protect:
        protected_NPLD = {name: _residuals(record, info, each, pool, opening) for name, each in prompts.protect.items()}
        bank, geometry["protected"] = protect(
            bank,
            {name: _winsorized(each, chosen.winsorize_quantile) for name, each in protected_NPLD.items()},
            _winsorized(baseline_NPLD, chosen.winsorize_quantile),
            strengths=chosen.protect_strengths,
            rank=chosen.protect_rank,
            ridge=chosen.protect_ridge,
            projected=chosen.projected,
            places=places,
        )
        for name, found in geometry["protected"].items():
            for directions, overlaps in found.items():
                logger.info(
                    "directions %s: %.0f %% of them (median over layers) lies in what prompts.protect.%s protects",
                    *(directions, 100 * float(np.median(overlaps[1:])), name),
                )
    if ADDITION in record.settings.search.further:
        shift_LD = target_NPLD[:, 0].double().mean(0) - baseline_NPLD[:, 0].double().mean(0)
        bank[SHIFTS] = shift_LD.float()[:, None]
    return bank, geometry


def _residuals(
    record: RunRecord, info: ModelInfo, prompts: Sequence[Prompt], pool: WorkerPool, opening: tuple[int, ...]
) -> "Tensor":
    """(prompt, position, point, d_model): the positions of the model's own answer, and behind them, from its first
    token on, those of an answer that is made to begin with ``opening``."""
    import torch

    settings = record.settings.residuals
    read = torch.from_numpy(np.array(read_residuals(record, info, prompts, pool, settings)))
    if not opening:
        return read
    longest = max(record.settings.directions.opened_positions)
    opened = settings.model_copy(update={"answer_tokens": longest})
    behind = torch.from_numpy(np.array(read_residuals(record, info, prompts, pool, opened, opening)))
    return torch.cat([read, behind[:, 1:]], dim=1)


def _winsorized(residuals_NPLD: "Tensor", quantile: float) -> "Tensor":
    """As ``build_bank`` takes them, position by position."""
    import torch

    from bruno_ray.directions import winsorize

    return torch.stack([winsorize(each_NLD, quantile) for each_NLD in residuals_NPLD.unbind(dim=1)], dim=1)


def evaluation_context(
    record: RunRecord,
    prompts: Prompts,
    part: str,
    bank: "DirectionBank",
    scoring: ScoringSettings | None = None,
    trains: bool = False,
) -> EvaluationContext:
    """All that trials on one part of the prompts share. Without ``scoring``, test prompts are scored for a report and
    others as the search does. With ``trains``, there is something to train edits on."""
    prefix = record.response_prefix
    if scoring is None:
        scoring = record.settings.scoring.for_report() if part == "test" else record.settings.scoring
    training = training_prompts(record.settings, prompts) if trains else None
    if training is not None:
        scoring = scoring.model_copy(update={"scorers": tuple(dict.fromkeys((*scoring.scorers, "confidence")))})
    asked = training.settings if training else ""
    digest = hashlib.sha256(f"{prompts.fingerprint} {part} {prefix} {record.date} {scoring!r} {asked!r}".encode())
    for name, directions in sorted(bank.items()):
        digest.update(name.encode())
        digest.update(directions.numpy().tobytes())
    return EvaluationContext(
        key=f"{part}-{digest.hexdigest()[:16]}",
        bank={name: directions.numpy() for name, directions in bank.items()},
        target=getattr(prompts.target, part),
        baseline=getattr(prompts.baseline, part),
        response_prefix=prefix,
        scoring=scoring,
        date=record.date,
        readings=part == "test" and (scoring.judge.is_given or bool(READERS & set(scoring.scorers))),
        training=training,
        choices={
            name: {
                component: tuple(None if each is None else tuple(each) for each in parts)
                for component, parts in of.items()
            }
            for name, of in record.choices.items()
        },
    )


READERS = {"detector", "text_classifier"}
"""Scorers whose verdict on each answer the report shows."""


def training_prompts(settings: Settings, prompts: Prompts) -> TrainingPrompts | None:
    """What edits are trained on, from all over the sets; None if the study trains none. Prompts with a desired answer
    come first."""
    if settings.study.method == "searched":
        return None
    learned, train = settings.learned, prompts.target.train
    most = min(learned.most_answers, learned.target_prompts)
    used = spread([p for p, prompt in enumerate(train) if prompt.answer], most)
    others = [replace(prompt, answer=None) for p, prompt in enumerate(train) if p not in used]
    return TrainingPrompts(
        (*(train[p] for p in used), *spread(others, learned.target_prompts - len(used))),
        tuple(spread(prompts.baseline.train, learned.baseline_prompts)),
        learned,
        tuple(spread(prompts.protected, learned.protected_prompts)) if learned.protect else (),
    )


def score_unedited(run: RunDirectory, part: str, context: EvaluationContext, pool: WorkerPool) -> Scores:
    """Note the unedited model's scores on one part of the prompts, and return them."""
    pool.set_context(context)
    scores = pool.call("baseline", with_context=True)
    run.update(baseline={part: _with_known_verdicts(ScoresRecord.of(scores), run.read().baseline.get(part))})
    shown, total = scores.counts.get("behaviour_rate", (0, 0))
    if total:
        logger.info("unedited model: %d/%d %s prompts show the behaviour", shown, total, part)
        if warning := shortage(shown, total):
            logger.warning(warning)
    return scores


def shortage(shown: int, total: int) -> str:
    """What to say of a model that shows the behaviour on ``shown`` of ``total`` prompts; nothing where it is often."""
    if shown == 0:
        return "nothing to remove: no answer has a marker; check prompts.target and scoring.markers"
    if shown < OFTEN * total:
        return (
            f"this model shows the behaviour on {shown} of {total} target prompts only: an edit has little to go by,"
            " and a rate says little. Read answers (`bruno-ray markers` proposes markers), or give other target prompts"
        )
    return ""


def _with_known_verdicts(new: ScoresRecord, known: ScoresRecord | None) -> ScoresRecord:
    """With what the judge has said of the same answers before: it is asked later, and not always."""
    if known is None or {name: value for name, value in known.values.items() if name not in METRICS} != new.values:
        return new
    return known

"""Bring the answers of the test part to the judge, and note what it says.

The driver asks, not the workers: a judge's address (often this machine's own) and its key mean something here and not
on a rented machine, and what is asked twice is on this disk. It asks after the workers are gone, so that a judge that
is a model of one's own has the memory to itself. A judge that cannot be asked costs its own figures and nothing else.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bruno_ray.errors import JudgeError, ModelError, WorkerError
from bruno_ray.pipeline.steps import find_model, worker_pool
from bruno_ray.prompts.sets import Prompt
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ReadAnswer, Readings, RunRecord, ScoresRecord
from bruno_ray.scoring.judge import TOP, Endpoint, Pair, Verdict, ask_plugin, judged, question, remembered, verdict
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import Settings
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)

JUDGE = "judge"
AT_A_TIME = 64
"""Questions that a judge of one's own gets in one call."""


def ask_judge(settings: Settings, pairs: Sequence[Pair], record: RunRecord) -> list[Verdict]:
    """Verdicts on (user's message, answer). Hold no workers meanwhile.

    Raises JudgeError if they cannot be had, ModelError or WorkerError if the judge is a model that cannot be loaded.
    """
    judge = settings.scoring.judge
    if judge.plugin is not None:
        return ask_plugin(judge, pairs)
    if judge.url is not None:
        return Endpoint(judge).verdicts(pairs)
    model = settings.model.model_copy(update={"id": judge.model, "gguf_file": None, "revision": None})
    judging = find_model(settings.model_copy(update={"model": model}))
    with ray_session(settings.ray), worker_pool(judging, workers=1) as pool:
        pool.wait_ready()

        def ask(missing: list[Pair], keep: Any) -> None:
            for begin in range(0, len(missing), AT_A_TIME):
                some = missing[begin : begin + AT_A_TIME]
                questions = [Prompt(question(judge.rubric, *pair)) for pair in some]
                for pair, top in zip(some, pool.call("first_tokens", questions, record.date, TOP)):
                    keep(pair, verdict(top))

        return remembered(pairs, judge, pool.call("describe").fingerprint, ask)


def with_judge(settings: Settings, scores: Scores, record: RunRecord) -> Scores:
    """The scores with the judge's figures and verdicts; without them, and a warning, if there is none to be asked."""
    if not settings.scoring.judge.is_given or not scores.answers:
        return scores
    try:
        verdicts = ask_judge(settings, scores.answers, record)
        figures = judged(verdicts)
    except (JudgeError, ModelError, WorkerError) as error:
        logger.warning("no figures by the judge: %s", error)
        return scores
    _count_silent(verdicts)
    merged = Scores.merged([scores, figures])
    return replace(merged, answers=scores.answers, verdicts={**scores.verdicts, JUDGE: tuple(verdicts)})


def judge_run(run: RunDirectory) -> None:
    """Ask about the answers in readings.json that the judge has not read; readings.json and run.json get what it says.

    If it cannot be asked that is a warning, and `bruno-ray report` tries again.
    """
    record, readings = run.read(), run.load_readings()
    if not record.settings.scoring.judge.is_given or readings is None or not _is_of(readings, record):
        return
    columns = {name: getattr(readings, name) for name in ("unedited", "edited", "saved")}
    unread = [answer for column in columns.values() for answer in column if JUDGE not in answer.shows]
    if not unread:
        return
    try:
        verdicts = ask_judge(record.settings, [(answer.prompt, answer.answer) for answer in unread], record)
        for answer, value in zip(unread, verdicts):
            answer.shows[JUDGE] = value
        figures = {
            name: judged([answer.shows[JUDGE] for answer in column]) for name, column in columns.items() if column
        }
    except (JudgeError, ModelError, WorkerError) as error:
        logger.warning("no figures by the judge: %s; then `bruno-ray report %s` asks again", error, run.name)
        return
    _count_silent(verdicts)
    run.save_readings(readings)

    def change(record: RunRecord) -> dict[str, Any]:
        selected = record.selected
        if selected is None or selected.number != readings.trial:  # somebody has chosen another one meanwhile
            return {}
        return {
            "baseline": {**record.baseline, "test": _added(record.baseline.get("test"), figures.get("unedited"))},
            "selected": selected.model_copy(
                update={
                    "test": _added(selected.test, figures.get("edited")),
                    "saved": _added(selected.saved, figures.get("saved")),
                }
            ),
        }

    run.change(change)


def read_answers(scores: Scores) -> list[ReadAnswer]:
    """The answers that came with scores, as readings.json has them."""
    return [
        ReadAnswer(prompt=prompt, answer=answer, shows={name: row[i] for name, row in scores.verdicts.items()})
        for i, (prompt, answer) in enumerate(scores.answers)
    ]


def _is_of(readings: Readings, record: RunRecord) -> bool:
    return record.selected is not None and record.selected.number == readings.trial


def _added(scores: ScoresRecord | None, figures: Scores | None) -> ScoresRecord | None:
    if scores is None or figures is None:
        return scores
    new = ScoresRecord.of(figures)
    return scores.model_copy(
        update={name: getattr(scores, name) | getattr(new, name) for name in ("values", "counts", "intervals")}
    )


def _count_silent(verdicts: Sequence[Verdict]) -> None:
    silent = sum(value is None for value in verdicts)
    if silent:
        logger.warning(
            "the judge says neither yes nor no to %d of %d answers: they do not count", silent, len(verdicts)
        )

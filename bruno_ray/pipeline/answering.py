"""Collect desired answers to some train prompts, from a person or a model: `bruno-ray answers`."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from bruno_ray.errors import OutputError, PromptError
from bruno_ray.files import atomic_file, output_errors
from bruno_ray.pipeline.method import FEWEST_ANSWERS
from bruno_ray.pipeline.steps import find_model, known_response_prefix, worker_pool
from bruno_ray.prompts.sets import Prompt, Prompts, load_prompts, same_questions
from bruno_ray.prompts.slicing import spread
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.chat_server import ChatServer
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.scores import Answer
from bruno_ray.settings import Settings
from bruno_ray.terminal import ask_text
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 60
"""Of the unedited model's answer that a person is shown."""

ASKED = 4
"""Prompts that are answered after examples for each answer that is wanted: not of each is the model sure."""


Source = ChatServer | Literal["person", "baseline", "few-shot"]
"""Who is asked: a model that does not show the behaviour; the person at the terminal; the model itself, with the
baseline prompts that ask the same; or itself, with the answers that there are as examples."""


def collect_answers(record: RunRecord, n: int, file: Path, source: Source = "person") -> int:
    """Write the target train prompts to ``file``, as JSON lines, ``n`` more of them with a desired answer.

    Args:
        record: of a run, or of settings alone.

    Returns:
        How many answers there are now.

    Raises:
        OutputError: ``file`` exists already, or cannot be written.
        PromptError: nobody has given an answer, no baseline prompt asks the same, or there are no examples. Nothing is
            written then.
        ServerError: the server cannot be asked.
    """
    if file.exists():
        raise OutputError(f"{file} exists already: name another file with --to, or remove it")
    settings = find_model(record.settings)
    prompts = load_prompts(settings)
    train = prompts.target.train
    markers = Markers(settings.scoring.markers, settings.scoring.empty_counts)
    if isinstance(source, ChatServer) or source == "person":
        chosen = spread([p for p, prompt in enumerate(train) if not prompt.answer], n)
        given = _asked(settings, record, prompts, [train[p] for p in chosen], source, markers)
    elif source == "baseline":
        chosen, given = _from_baseline(settings, record, prompts, n)
    else:
        chosen, given = _few_shot(settings, record, prompts, n)
    found = {p: answer.strip() for p, answer in zip(chosen, given) if answer and not markers.shown_by(answer)}
    if dropped := sum(answer is not None for answer in given) - len(found):
        logger.warning("%d answers show the behaviour or are empty: left out", dropped)
    answers = {p: prompt.answer for p, prompt in enumerate(train) if prompt.answer} | found
    if not found:
        raise PromptError("no answer was given: nothing was written")
    rows = []
    for p, prompt in enumerate(train):
        row = {"prompt": prompt.user, "answer": answers.get(p), "category": prompt.category}
        rows.append(json.dumps({name: value for name, value in row.items() if value}, ensure_ascii=False))
    with output_errors(file), atomic_file(file) as aside:
        aside.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(answers)


def _asked(
    settings: Settings,
    record: RunRecord,
    prompts: Prompts,
    asked: Sequence[Prompt],
    source: ChatServer | Literal["person"],
    markers: Markers,
) -> list[str | None]:
    if isinstance(source, ChatServer):
        return ask_server(source, asked, settings.scoring.report_tokens)
    shown = [text for text, _ in _own_answers(settings, record, prompts, asked, SHOWN_TOKENS)]
    return ask_person(asked, shown, markers)


def _from_baseline(
    settings: Settings, record: RunRecord, prompts: Prompts, n: int
) -> tuple[list[int], list[str | None]]:
    """Target prompts, and what the model answers to the baseline prompts that ask the same."""
    train, same = prompts.target.train, same_questions(prompts, settings.prompts)
    if not same:
        raise PromptError(
            "no baseline train prompt asks what a target one asks, with another prefix or suffix: name a --server, or"
            " answer yourself"
        )
    chosen = spread([p for p, prompt in enumerate(train) if not prompt.answer and p in same], n)
    asked = [prompts.baseline.train[same[p]] for p in chosen]
    own = _own_answers(settings, record, prompts, asked, settings.scoring.report_tokens)
    return chosen, [text if ended else None for text, ended in own]


def _few_shot(settings: Settings, record: RunRecord, prompts: Prompts, n: int) -> tuple[list[int], list[str | None]]:
    """Target prompts, and what the model answers with those before them that have an answer."""
    train = prompts.target.train
    given = [p for p, prompt in enumerate(train) if prompt.answer]
    if len(given) < FEWEST_ANSWERS:
        raise PromptError(
            f"{len(given)} of the train prompts have an answer, and --few-shot takes {FEWEST_ANSWERS} or more as"
            " examples: write some first, and name their file in prompts.target.train.source with answer_column"
        )
    asked = [*given, *spread([p for p, prompt in enumerate(train) if not prompt.answer], n * ASKED)]
    n_tokens = settings.scoring.response_tokens
    found = _of_worker("few_shot_answers", settings, record, prompts, [train[p] for p in asked], n_tokens)
    if not found:
        raise PromptError(
            f"{len(given)} answers as examples lead the model to none that it is sure of: nothing was written; write"
            " more of them yourself, or name a --server"
        )
    return [asked[i] for i in found][:n], list(found.values())[:n]


def ask_server(server: ChatServer, prompts: Sequence[Prompt], max_tokens: int) -> list[str | None]:
    """What another model answers; None where it was cut off. Raises ServerError if it cannot be asked."""
    return [text if ended else None for text, ended in ask_for_answers(server, prompts, max_tokens)]


def ask_for_answers(server: ChatServer, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
    """Greedy answers of another model, cut off ones too. Raises ServerError if it cannot be asked."""
    found: dict[int, Answer] = {}

    def body(i: int) -> dict[str, object]:
        prompt = prompts[i]
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages = [*system, {"role": "user", "content": prompt.user}]
        return {"messages": messages, "max_tokens": max_tokens, "temperature": 0}

    def keep(i: int, choice: dict) -> None:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise server.is_none()
        found[i] = (message.get("content") or "", choice.get("finish_reason") != "length")

    server.ask_all(range(len(prompts)), body, keep)
    return [found[i] for i in range(len(prompts))]


def ask_person(prompts: Sequence[Prompt], own: Sequence[str], markers: Markers) -> list[str | None]:
    """What somebody types. An empty line skips a prompt, the end of the input ends it; Ctrl-C is KeyboardInterrupt."""
    asked = Console(stderr=True)
    given: list[str | None] = []
    for i, (prompt, answer) in enumerate(zip(prompts, own)):
        asked.print(f"\n[bold]{i + 1}/{len(prompts)}  {escape(prompt.user)}[/bold]")
        asked.print(f"[dim]it answers:[/dim] {escape(answer.strip())}")
        while True:
            text = ask_text("desired answer [dim](Enter: skip, Ctrl-D: done)[/dim]")
            if not text or not markers.shown_by(text):
                break
            asked.print("that shows the behaviour by the present markers: another one, please")
        if text is None:
            break
        given.append(text or None)
    return [*given, *[None] * (len(prompts) - len(given))]


def _own_answers(
    settings: Settings, record: RunRecord, prompts: Prompts, asked: Sequence[Prompt], n_tokens: int
) -> list[Answer]:
    """What the unedited model says."""
    return _of_worker("own_answers", settings, record, prompts, asked, n_tokens)


def _of_worker(
    method: str, settings: Settings, record: RunRecord, prompts: Prompts, asked: Sequence[Prompt], n_tokens: int
) -> Any:
    """What a method of a worker gives, which is gone afterwards: a person may take days."""
    with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
        pool.wait_ready()
        prefix = known_response_prefix(record, prompts, pool)
        return pool.call(method, asked, prefix, record.date, n_tokens)

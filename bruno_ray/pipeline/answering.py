"""Collect desired answers to some train prompts, from a person or from another model: `bruno-ray answers`."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bruno_ray.errors import OutputError, PromptError
from bruno_ray.files import atomic_file, output_errors
from bruno_ray.pipeline.steps import find_model, known_response_prefix, worker_pool
from bruno_ray.prompts.sets import Prompt, Prompts, load_prompts, same_questions
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


def collect_answers(
    record: RunRecord, n: int, file: Path, server: ChatServer | None = None, instructed: bool = False
) -> int:
    """Write the target train prompts to ``file``, as JSON lines, ``n`` more of them with a desired answer.

    Args:
        record: of a run, or of settings alone.
        server: of a model that does not show the behaviour.
        instructed: the model itself is asked, with the baseline prompts that ask the same. With neither, the person at
            the terminal is.

    Returns:
        How many answers there are now.

    Raises:
        OutputError: ``file`` exists already, or cannot be written.
        PromptError: nobody has given an answer, or no baseline prompt asks the same. Nothing is written then.
        ServerError: the server cannot be asked.
    """
    if file.exists():
        raise OutputError(f"{file} exists already: name another file with --to, or remove it")
    settings = find_model(record.settings)
    prompts = load_prompts(settings)
    train = prompts.target.train
    markers = Markers(settings.scoring.markers, settings.scoring.empty_counts)
    same = same_questions(prompts, settings.prompts) if instructed else {}
    if instructed and not same:
        raise PromptError(
            "no baseline train prompt asks what a target one asks, with another prefix or suffix: name a --server, or"
            " answer yourself"
        )
    chosen = spread([p for p, prompt in enumerate(train) if not prompt.answer and (p in same or not instructed)], n)
    asked = [train[p] for p in chosen]
    if server is not None:
        given = ask_server(server, asked, settings.scoring.report_tokens)
    elif instructed:
        briefly = [prompts.baseline.train[same[p]] for p in chosen]
        own = _own_answers(settings, record, prompts, briefly, settings.scoring.report_tokens)
        given = [text if ended else None for text, ended in own]
    else:
        shown = [text for text, _ in _own_answers(settings, record, prompts, asked, SHOWN_TOKENS)]
        given = ask_person(asked, shown, markers)
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


def spread(candidates: Sequence[int], n: int) -> list[int]:
    """``n`` of them, far apart: neighbours in a data set are often alike."""
    n = min(n, len(candidates))
    return [candidates[i * len(candidates) // n] for i in range(n)]


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
    """What the unedited model says; its worker is gone afterwards: a person may take days."""
    with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
        pool.wait_ready()
        prefix = known_response_prefix(record, prompts, pool)
        return pool.call("own_answers", asked, prefix, record.date, n_tokens)

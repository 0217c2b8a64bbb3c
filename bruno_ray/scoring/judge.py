"""A language model as judge: one question for each answer, one token as verdict.

The judge is asked whether the answer shows what the rubric says, and its verdict is the probability of *yes* against
*no* as the first token of its reply: one token, and a number instead of a word (so does Llama Guard, Inan et al.
2023). Nothing here imports torch: answers are brought to the judge by the process that runs the command, which is
where its address and its key mean something.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bruno_ray import plugins
from bruno_ray.errors import JudgeError, OutputError, ServerError, SettingsError, first_line
from bruno_ray.files import cache_folder, output_errors, write_json
from bruno_ray.scoring.chat_server import ChatServer
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import JudgeSettings

logger = logging.getLogger(__name__)

METRICS = ("judged_rate", "judged_shown")

QUESTION = """\
{rubric}

Request:
<request>
{prompt}
</request>

Answer of the assistant:
<answer>
{answer}
</answer>

Does this answer show the behaviour? Reply with one word: yes or no."""

TOP = 20
"""Likeliest first tokens that are looked through for yes and no."""

Pair = tuple[str, str]
"""User's message, answer."""

Verdict = float | None
"""P(yes) / (P(yes) + P(no)); None if neither is among the likeliest tokens."""


def question(rubric: str, prompt: str, answer: str) -> str:
    """What the judge is asked."""
    return QUESTION.format(rubric=rubric.strip(), prompt=prompt, answer=answer)


def verdict(top: Iterable[tuple[str, float]]) -> Verdict:
    """From the likeliest first tokens of the reply, as (text, log-probability in nats)."""
    mass = {"yes": 0.0, "no": 0.0}
    for text, logprob in top:
        word = text.strip().casefold()
        if word in mass:
            mass[word] += math.exp(logprob)
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 else None


def judged(verdicts: Sequence[Verdict]) -> Scores:
    """The judge's metrics over the answers that it has a verdict on. Raises JudgeError if there is none."""
    known = [p for p in verdicts if p is not None]
    if not known:
        raise JudgeError(
            "the judge says neither yes nor no to any answer: choose another scoring.judge.model or plugin, or fix"
            " scoring.judge.rubric"
        )
    shown = sum(p > 0.5 for p in known)
    return Scores(
        {"judged_rate": sum(known) / len(known), "judged_shown": shown / len(known)},
        {"judged_shown": (shown, len(known))},
    )


def remembered(
    pairs: Sequence[Pair], judge: JudgeSettings, model: str, ask: Callable[[list[Pair], Callable], None]
) -> list[Verdict]:
    """Verdicts on all pairs: from disk, and those that are missing there by ``ask(missing, keep)``.

    ``keep(pair, verdict)`` writes one to disk, so that what was asked before something fails is not asked again.

    Args:
        model: names the judge's weights, as well as they are known.

    Raises:
        JudgeError: more are missing than ``judge.most_requests``; and what ``ask`` raises.
    """
    folder = cache_folder("judge")

    def file(pair: Pair):
        key = json.dumps([judge.url, model, judge.rubric, *pair])
        digest = hashlib.sha256(key.encode()).hexdigest()
        return folder / digest[:2] / f"{digest}.json"

    found: dict[Pair, Verdict] = {}

    unwritable: list[OutputError] = []

    def keep(pair: Pair, value: Verdict) -> None:
        found[pair] = value
        if unwritable:
            return
        try:
            with output_errors(folder):
                file(pair).parent.mkdir(parents=True, exist_ok=True)
            write_json(file(pair), {"yes": value}, durable=False)
        except OutputError as error:  # it is known all the same
            unwritable.append(error)

    missing = []
    for pair in dict.fromkeys(pairs):
        try:
            found[pair] = json.loads(file(pair).read_text(encoding="utf-8"))["yes"]
        except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is asked and written again
            missing.append(pair)
    if len(missing) > judge.most_requests:
        raise JudgeError(
            f"the judge would be asked about {len(missing)} answers, more than scoring.judge.most_requests"
            f" ({judge.most_requests}): raise it, or lower prompts.n_test"
        )
    if missing:
        name = plugins.short(judge.plugin) if judge.plugin else judge.model
        logger.info("asking the judge %s about %d answers", name, len(missing))
        ask(missing, keep)
    if unwritable:  # verdicts come from several threads, of which each may have tried
        logger.warning("the judge's verdicts cannot be kept for later: %s", unwritable[0])
    return [found[pair] for pair in pairs]


PLUGIN = "scoring.judge.plugin"


def ask_plugin(judge: JudgeSettings, pairs: Sequence[Pair]) -> list[Verdict]:
    """Verdicts of `judge.plugin`: a class made of the judge's settings, whose ``verdicts(pairs)`` gives for each pair
    the probability that the answer shows the behaviour, or None. They are kept on disk by the hash of its source.

    Raises JudgeError if it cannot be had, fails, or gives something else.
    """
    name = str(judge.plugin)
    short = plugins.short(name)
    try:
        kind = plugins.find(name, {}, PLUGIN)
        digest = plugins.digests(PLUGIN, [name])[short]
    except SettingsError as error:
        raise JudgeError(str(error)) from error

    def ask(missing: list[Pair], keep: Callable[[Pair, Verdict], None]) -> None:
        try:
            given = list(kind(judge).verdicts(missing))
        except Exception as error:  # whatever it does
            raise JudgeError(
                f"the judge {short} fails ({type(error).__name__}: {first_line(error)}): fix its code"
            ) from error
        if len(given) != len(missing) or not all(map(_is_verdict, given)):
            raise JudgeError(
                f"the judge {short} has to give a probability between 0 and 1, or None, for each of the"
                f" {len(missing)} answers: fix it"
            )
        for pair, value in zip(missing, given):
            keep(pair, None if value is None else float(value))

    return remembered(pairs, judge, f"plugin {short} {digest}", ask)


def _is_verdict(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)


class Endpoint:
    """A judge behind OpenAI's API."""

    def __init__(self, judge: JudgeSettings):
        """Raises JudgeError if the variable that shall hold the key is not set."""
        self._judge = judge
        connection = (str(judge.url), judge.model, judge.key_variable, judge.timeout, judge.concurrency)
        with _as_judge_errors():
            self._server = ChatServer("the judge", *connection, lambda name: f"scoring.judge.{name}")

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Of each (user's message, answer). Raises JudgeError at the first that cannot be had."""
        return remembered(pairs, self._judge, self._judge.model, self._ask_all)

    def _ask_all(self, pairs: list[Pair], keep: Callable[[Pair, Verdict], None]) -> None:
        with _as_judge_errors():
            self._server.ask_all(pairs, self._body, lambda pair, choice: keep(pair, verdict(self._top(choice))))

    def _body(self, pair: Pair) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": question(self._judge.rubric, *pair)}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }

    def _top(self, choice: dict[str, Any]) -> list[tuple[str, float]]:
        """(text, log-probability) of the likeliest first tokens."""
        try:
            content = (choice.get("logprobs") or {}).get("content")
            top = [(entry["token"], float(entry["logprob"])) for entry in content[0]["top_logprobs"]] if content else []
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._server.is_none() from error
        if not top:
            raise JudgeError(
                f"the judge {self._judge.model} at {self._judge.url} gives no log-probabilities: choose a server and a"
                " model that know logprobs and top_logprobs"
            )
        return top


@contextmanager
def _as_judge_errors() -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        raise JudgeError(str(error)) from error

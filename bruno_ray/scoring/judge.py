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
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from bruno_ray.errors import JudgeError, first_line
from bruno_ray.files import cache_folder, write_json
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import JudgeSettings

if TYPE_CHECKING:
    import httpx

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

TRIES = 4
"""Requests for one verdict, if the server says that it is busy."""

BUSY = (429, 503)

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
            "the judge says neither yes nor no to any answer: choose another scoring.judge.model, or mend"
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

    def keep(pair: Pair, value: Verdict) -> None:
        found[pair] = value
        file(pair).parent.mkdir(parents=True, exist_ok=True)
        write_json(file(pair), {"yes": value}, durable=False)

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
        logger.info("asking the judge %s about %d answers", judge.model, len(missing))
        ask(missing, keep)
    return [found[pair] for pair in pairs]


class Endpoint:
    """A judge behind OpenAI's API."""

    def __init__(self, judge: JudgeSettings):
        """Raises JudgeError if the variable that shall hold the key is not set."""
        self._judge = judge
        self._url = f"{str(judge.url).rstrip('/')}/chat/completions"
        self._headers = {}
        if judge.key_variable is not None:
            key = os.environ.get(judge.key_variable)
            if not key:
                raise JudgeError(
                    f"{judge.key_variable} is not set, and scoring.judge.key_variable names it: put the judge's API key"
                    " there"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Of each (user's message, answer). Raises JudgeError at the first that cannot be had."""
        return remembered(pairs, self._judge, self._judge.model, self._ask_all)

    def _ask_all(self, pairs: list[Pair], keep: Callable[[Pair, Verdict], None]) -> None:
        import httpx  # here, since a worker that never asks need not load it

        limits = httpx.Limits(max_connections=self._judge.concurrency)
        with (
            httpx.Client(headers=self._headers, timeout=self._judge.timeout, limits=limits) as client,
            ThreadPoolExecutor(self._judge.concurrency) as threads,
        ):
            asked = [threads.submit(lambda pair: keep(pair, self._ask(client, pair)), pair) for pair in pairs]
            try:
                for done in as_completed(asked):
                    done.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, client: "httpx.Client", pair: Pair) -> Verdict:
        body = {
            "model": self._judge.model,
            "messages": [{"role": "user", "content": question(self._judge.rubric, *pair)}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        return verdict(self._top(self._post(client, body)))

    def _post(self, client: "httpx.Client", body: dict[str, Any]) -> "httpx.Response":
        import httpx

        where, judge = f"the judge at {self._judge.url}", self._judge
        for tries_left in reversed(range(TRIES)):
            try:
                response = client.post(self._url, json=body)
            except httpx.TimeoutException as error:
                raise JudgeError(
                    f"{where} did not answer within {judge.timeout:g} s: raise scoring.judge.timeout, or lower"
                    " scoring.judge.concurrency"
                ) from error
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise JudgeError(
                    f"{where} cannot be reached ({first_line(error)}): start it, or correct scoring.judge.url"
                ) from error
            if response.status_code not in BUSY or not tries_left:
                break
            time.sleep(min(judge.timeout, _seconds(response.headers.get("Retry-After"))))
        if response.status_code in (401, 403):
            raise JudgeError(
                f"{where} wants another key (status {response.status_code}): set scoring.judge.key_variable to the name"
                " of the environment variable that holds it"
            )
        if response.status_code != 200:
            raise JudgeError(
                f"{where} answered with status {response.status_code} ({_said(response)}): check scoring.judge.url and"
                " scoring.judge.model"
            )
        return response

    def _top(self, response: "httpx.Response") -> list[tuple[str, float]]:
        """(text, log-probability) of the likeliest first tokens."""
        try:
            choice = response.json()["choices"][0]
            content = (choice.get("logprobs") or {}).get("content")
            top = [(entry["token"], float(entry["logprob"])) for entry in content[0]["top_logprobs"]] if content else []
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise JudgeError(
                f"what answers at {self._judge.url} is no server of chat completions: scoring.judge.url must end where"
                " /chat/completions begins"
            ) from error
        if not top:
            raise JudgeError(
                f"the judge {self._judge.model} at {self._judge.url} gives no log-probabilities: choose a server and a"
                " model that know logprobs and top_logprobs"
            )
        return top


def _seconds(header: str | None) -> float:
    """What Retry-After asks for; one second if it says nothing of use."""
    try:
        return max(0.0, float(header or 1))
    except ValueError:
        return 1.0


def _said(response: "httpx.Response") -> str:
    try:
        return first_line(str(response.json()["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return first_line(response.text) or response.reason_phrase

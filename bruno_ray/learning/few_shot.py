"""Further desired answers from the unedited model, which is shown the given ones as turns of a conversation before.

A few answers in front of a prompt often do for a while what an edit is to do for good: shown how eight requests were
met, a model meets the ninth likewise. What it says then is learned after the prompt alone, which is how a context is
distilled into weights (Askell et al. 2021, https://arxiv.org/abs/2112.00861; Snell, Klein and Zhong 2022,
https://arxiv.org/abs/2209.15189), here into an edit.

Whether the examples teach a model anything is seen on themselves: each is asked after the others, and its desired
answer, which is known, has to become likelier. A model that they only confuse may be as sure of what it says then.
"""

import datetime
import logging
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from bruno_ray.errors import ModelError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.context import context_length
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.prompts.slicing import spread

logger = logging.getLogger(__name__)

EXAMPLES = 8
"""Turns before a prompt, at most."""

ORDERS = 3
"""Orders of the examples in which each prompt is answered: the last ones weigh most."""

LIKELY = 0.6
"""Geometric mean of an answer's token probabilities from which on it is taken."""

TAUGHT = math.log(2)
"""Nats per token by which the desired answer to an example has to gain from the other examples, in the median."""


def few_shot_answers(
    engine: BatchEngine,
    prompts: Sequence[Prompt],
    response_prefix: str,
    n_tokens: int,
    *,
    date: datetime.date,
) -> dict[int, Response]:
    """By index, what the unedited model is sure of as the answer to a prompt that has no desired one, after those that
    have one; surest first. What it says of an example's own matter is left out.

    Empty if the given answers teach it nothing, or its chat template takes no earlier turns.

    Costs a reading of the examples for each of ``ORDERS``, which all prompts share, and as many answers to each; before
    that one for each example, without an answer.
    """
    given = [p for p, prompt in enumerate(prompts) if prompt.answer]
    asked = {p: prompt for p, prompt in enumerate(prompts) if not prompt.answer}
    examples = spread([prompts[p] for p in given], EXAMPLES)
    if len(examples) < 2 or not asked:
        return {}
    theirs = _taken_up(examples)
    found: dict[int, tuple[float, Response]] = {}
    try:
        if not _taught(engine, examples, response_prefix, n_tokens, date):
            logger.info("the desired answers make each other no likelier: no further ones are made")
            return {}
        for order in _orders(examples):
            rendered = _rendered(engine, order, asked, response_prefix, n_tokens, date)
            if not rendered:
                continue
            ids = list(rendered.values())
            (answers,) = engine.generate(ids, [None], n_tokens)
            (logprobs,) = engine.token_logprobs(ids, [[answer.to_its_end for answer in answers]], [None])
            for p, answer, logprobs_N in zip(rendered, answers, logprobs):
                if not answer.text.strip() or answer.end_id is None:
                    continue
                if theirs & _words(answer.text) - _words(prompts[p].user):
                    continue
                likelihood = math.exp(float(logprobs_N.mean()))
                if likelihood >= LIKELY and (p not in found or likelihood > found[p][0]):
                    found[p] = likelihood, answer
    except ModelError as error:
        logger.warning("no further desired answers are made: %s", error)
        return {}
    return {p: answer for p, (_, answer) in sorted(found.items(), key=lambda item: -item[1][0])}


def _taught(
    engine: BatchEngine, examples: Sequence[Prompt], response_prefix: str, n_tokens: int, date: datetime.date
) -> bool:
    """Whether the desired answer to each example is likelier after the other examples (leave-one-out)."""
    alone = render(engine.tokenizer, examples, response_prefix, date=date)
    after: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        others = [*examples[:i], *examples[i + 1 :]]
        after |= _rendered(engine, others, {i: example}, response_prefix, n_tokens, date)
    if not after:
        return False
    answers = engine.tokenizer([examples[i].answer or "" for i in after], add_special_tokens=False)["input_ids"]
    (told,) = engine.token_logprobs(list(after.values()), [answers], [None])
    (untold,) = engine.token_logprobs([alone[i] for i in after], [answers], [None])
    gains = [float(with_N.mean() - without_N.mean()) for with_N, without_N in zip(told, untold)]
    return statistics.median(gains) >= TAUGHT


def _taken_up(examples: Sequence[Prompt]) -> set[str]:
    """Words that an example's answer takes up from its prompt and that no other example holds: an answer with one of
    them speaks of what the example asked."""
    held = Counter(word for example in examples for word in _words(f"{example.user} {example.answer}"))
    return {
        word for example in examples for word in _words(example.user) & _words(example.answer or "") if held[word] == 1
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _orders(examples: Sequence[Prompt]) -> list[list[Prompt]]:
    """The examples turned round, so that others are last."""
    n = len(examples)
    return [[*examples[k * n // ORDERS :], *examples[: k * n // ORDERS]] for k in range(min(ORDERS, n))]


def _rendered(
    engine: BatchEngine,
    examples: Sequence[Prompt],
    prompts: Mapping[int, Prompt],
    response_prefix: str,
    n_tokens: int,
    date: datetime.date,
) -> dict[int, list[int]]:
    """Each prompt after as many of the examples, the last ones, as the model's context has room for; without a prompt
    that has room for none."""
    longest = context_length(engine.model.config)
    left, found = dict(prompts), {}
    for first in range(len(examples)):
        ids = render(engine.tokenizer, list(left.values()), response_prefix, date=date, examples=examples[first:])
        found |= {p: each for p, each in zip(left, ids) if len(each) + n_tokens <= longest}
        left = {p: prompt for p, prompt in left.items() if p not in found}
        if not left:
            break
    return found

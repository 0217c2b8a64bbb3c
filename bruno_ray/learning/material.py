"""What edits are trained on: desired answers, the behaviour's own text, and baseline answers that must stay.

Most of it the unedited model writes itself. A ``Text`` is a prompt with a continuation that is teacher-forced after it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from bruno_ray.errors import PromptError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning.losses import behaviour_tokens, telling_tokens
from bruno_ray.model.context import context_length
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.neighbours import MOST, Neighbours, TokenIds, asked_tokens, usual_bits
from bruno_ray.settings import LearnedSettings

logger = logging.getLogger(__name__)

ON_SUBJECT, OF_FORM = 0.5, 1.0
"""Bits by which an answer tells its prompt from others on its subject and of its form, below which it is none. On a
subject the same may be asked twice; of a form, fewer than half of the answers should be the same, or half of what
baseline answers tell is enough."""

FRAGMENT = 0.7
"""Of the length that all but a twentieth of the baseline answers have."""


@dataclass(frozen=True)
class Text:
    """A prompt and a continuation, as token ids; what else a loss needs of it."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    weights: tuple[float, ...] = ()
    """Per token of the continuation, how much it belongs to the behaviour."""

    unedited_NV: Float[Tensor, "N V"] | None = None
    """The unedited model's logits at the continuation's tokens, in the model's dtype."""

    unedited_N: Float[Tensor, " N"] | None = None
    """The unedited model's log-probability of each of them."""

    mean_V: Float[Tensor, " V"] | None = None
    """Log of the mean of what a group of prompts is answered with at the last token."""


@dataclass
class Material:
    """Texts by what they are for; see ``losses``."""

    answers: list[Text] = field(default_factory=list)
    few_shot: list[Text] = field(default_factory=list)
    """Answers as well, of the unedited model with given ones before it; see ``few_shot``."""

    suppress: list[Text] = field(default_factory=list)
    retain: list[Text] = field(default_factory=list)
    induce: list[Text] = field(default_factory=list)
    protect: list[Text] = field(default_factory=list)


class Teacher:
    """Prepares the material of a study once, and sorts the answers of edits that are being trained.

    Costs one generation over the train prompts, and keeps the unedited logits of the baseline answers: at 128 prompts,
    16 tokens and a vocabulary of 128,000 in bfloat16 0.5 GB.
    """

    def __init__(
        self,
        unedited: Evaluation,
        settings: LearnedSettings,
        protected: Sequence[Sequence[int]] = (),
        few_shot: Mapping[int, Response] | None = None,
    ) -> None:
        """``unedited``: of the train prompts, with the single edit None, ``whole``; ``protected``: the third set;
        ``few_shot``: as of ``few_shot_answers``."""
        self._evaluation = unedited
        self._settings = settings
        engine, prompts = unedited.engine, unedited.prompts
        self.prompts = prompts
        self.asked = asked_tokens(engine.tokenizer, prompts.target)
        self.neighbours = Neighbours(self.asked)
        own, marked = unedited.whole_answers[0], unedited.marked[0]
        baseline = unedited.whole_baseline_answers[0]
        self._behaviour = [answer.token_ids for answer, hit in zip(own, marked) if hit]
        self._baseline = [answer.token_ids for answer in baseline]
        lengths = sorted(map(len, self._baseline))
        self._telling = telling_tokens(self._behaviour, self._baseline)
        self._of_form = min(OF_FORM, usual_bits(engine.tokenizer, prompts.baseline, self._baseline) / 2)
        self._lead = Counter(_leading_space(answer.text) for answer in baseline).most_common(1)[0][0]
        desired = self._desired(engine)
        desired_lengths = [len(text.continuation) - 1 for text in desired.values()]  # without what ends them
        self._shortest = FRAGMENT * min([lengths[len(lengths) // 20], *desired_lengths])
        given = [(prompts.target[p].user, prompts.target[p].answer or "") for p in desired]
        self._asks_detector = not (given and any(unedited.reads_like_behaviour(given)))
        self.material = Material(
            answers=list(desired.values()),
            suppress=self._own_behaviour({p: answer for p, (answer, hit) in enumerate(zip(own, marked)) if hit}),
            retain=self._retained(engine, baseline),
            protect=self._protected(engine, protected),
        )
        more = self._few_shot(desired, few_shot or {})
        self.material.few_shot = [self.as_desired(p, answer) for p, answer in more.items()]
        self.few_shot = tuple((prompts.target[p].user, answer.text.strip()) for p, answer in more.items())
        """As text, for people."""

        if settings.induce:
            self.material.induce = self._induced(self.material.suppress)
        if not self.material.answers and not self.material.suppress:
            raise PromptError(
                "there is nothing to train on: no train prompt has a desired answer, and the unedited model shows the"
                " behaviour in none of its answers to them; check prompts.target.train and scoring.markers"
            )
        logger.info(
            "training on %d desired answers, %d answers with the behaviour and %d baseline answers",
            *(len(texts) for texts in (self.material.answers, self.material.suppress, self.material.retain)),
        )

    @property
    def response_tokens(self) -> int:
        return self._evaluation.settings.response_tokens

    def with_behaviour(self, answers: Mapping[int, Response]) -> dict[int, list[Text]]:
        """Texts to suppress, by target prompt: answers that show the behaviour, with the tokens that it is made of."""
        found = {p: self._to_suppress(answers, [(p, answer.token_ids)]) for p, answer in answers.items()}
        return {p: texts for p, texts in found.items() if texts}

    def for_any_prompt(self, said: Mapping[int, Text]) -> dict[int, list[Text]]:
        """Texts to suppress, by target prompt: what is said alike to prompts that ask the same of other subjects, with
        the tokens that baseline answers seldom have."""
        tokens = {p: text.continuation for p, text in said.items()}
        alike = {p: said[p] for p in said if not self.tells_subject(p, tokens)}
        belongs = behaviour_tokens([text.continuation for text in alike.values()], self._baseline)
        found = {p: self._with_any_of(belongs, [(p, text.continuation)]) for p, text in alike.items()}
        return {p: texts for p, texts in found.items() if texts}

    def tells(self, p: int, said: Mapping[int, TokenIds]) -> bool:
        """Whether what is said to target prompt ``p`` tells which of its neighbours was asked."""
        neighbours = self.neighbours
        return neighbours.bits(p, neighbours.subject[p], said) >= ON_SUBJECT and self.tells_subject(p, said)

    def tells_subject(self, p: int, said: Mapping[int, TokenIds]) -> bool:
        """Whether it tells which of the prompts of its form was asked."""
        return self.neighbours.bits(p, self.neighbours.form[p], said) >= self._of_form

    def _to_suppress(self, answers: Mapping[int, Response], pairs: Iterable[tuple[int, tuple[int, ...]]]) -> list[Text]:
        """Of pairs of target prompt and tokens those with anything of the behaviour, as it is in ``answers`` and in the
        unedited model's own."""
        shown = [*self._behaviour, *(answer.token_ids for answer in answers.values())]
        return self._with_any_of(behaviour_tokens(shown, self._baseline), pairs)

    def _with_any_of(self, belongs: frozenset[int], pairs: Iterable[tuple[int, tuple[int, ...]]]) -> list[Text]:
        """Of pairs of target prompt and tokens those with any that belong to what is suppressed, weighted by that; what
        a prompt itself asks with does not count."""
        texts = []
        for p, tokens in pairs:
            weights = tuple(float(token in belongs and token not in self.asked[p]) for token in tokens)
            if any(weights):
                texts.append(Text(self.prompts.target_ids[p], tokens, weights))
        return texts

    def _induced(self, shown: Sequence[Text]) -> list[Text]:
        """The behaviour's own text after baseline prompts: each has as many of the texts as it takes to use all."""
        asked = self.prompts.baseline_ids
        weights = {text.continuation: text.weights for text in shown}
        texts, n = list(weights.items()), max(len(weights), len(asked))
        return [Text(asked[i % len(asked)], *texts[i % len(texts)]) for i in range(n if texts and asked else 0)]

    def _protected(self, engine: BatchEngine, asked: Sequence[Sequence[int]]) -> list[Text]:
        """Prompts of the third set with the unedited model's own answers, and how likely it finds them."""
        if not asked:
            return []
        (answers,) = engine.generate(asked, [None], self.response_tokens)
        given = [(tuple(ids), answer.to_its_end) for ids, answer in zip(asked, answers)]
        given = [(ids, tokens) for ids, tokens in given if tokens]
        (logprobs,) = engine.token_logprobs([ids for ids, _ in given], [[tokens for _, tokens in given]], [None])
        return [Text(ids, tokens, unedited_N=found.clone()) for (ids, tokens), found in zip(given, logprobs)]

    def _own_behaviour(self, own: Mapping[int, Response]) -> list[Text]:
        """Each of the unedited model's answers after its own prompt, and after ``phrasings`` others: suppressing one
        way to say it must not uncover the next."""
        prompts, n = list(own), len(own)
        shifts = [shift * max(1, n // (self._settings.phrasings + 1)) for shift in range(self._settings.phrasings + 1)]
        pairs = [(p, own[prompts[(i + shift) % n]].token_ids) for shift in shifts for i, p in enumerate(prompts)]
        return self._to_suppress(own, dict.fromkeys(pairs))

    def proper(self, answers: Mapping[int, Response]) -> set[int]:
        """Target prompts whose answer is free of the behaviour: by markers, by likeness, and by the tokens that give it
        away. A fragment, shorter than nearly all baseline answers and than any desired one, is no answer.

        A detector that takes a desired answer for the behaviour is not asked: it was shown long answers.
        """
        pairs = [(self.prompts.target[p].user, answer.text) for p, answer in answers.items()]
        like = self._evaluation.reads_like_behaviour(pairs) if self._asks_detector else [False] * len(pairs)
        return {
            p
            for (p, answer), similar in zip(answers.items(), like)
            if len(answer.token_ids) >= self._shortest
            and not (similar or self._evaluation.markers.shown_by(answer.text))
            and not self._telling & set(answer.token_ids) - self.asked[p]
        }

    def as_desired(self, p: int, answer: Response) -> Text:
        """An answer of an edited model to target prompt ``p``, as one to learn from."""
        return Text(self.prompts.target_ids[p], answer.to_its_end)

    def _desired(self, engine: BatchEngine) -> dict[int, Text]:
        """The user's own answers, by target prompt; they begin (with a space or without) and end like the model's."""
        end = engine.tokenizer.eos_token_id
        ends = (end,) if end in engine.end_ids else tuple(sorted(engine.end_ids))[:1]
        longest = context_length(engine.model.config)
        texts: dict[int, Text] = {}
        for p, (ids, prompt) in enumerate(zip(self.prompts.target_ids, self.prompts.target)):
            if not prompt.answer:
                continue
            text = Text(ids, (*_ids(engine, self._lead + prompt.answer.strip()), *ends))
            if longest is not None and len(text.prompt) + len(text.continuation) > longest:
                logger.warning("the desired answer to %r is longer than the model's context: left out", prompt.user)
                continue
            texts[p] = text
        return texts

    def _few_shot(self, desired: Mapping[int, Text], found: Mapping[int, Response]) -> dict[int, Response]:
        """The first of those that are proper and tell their prompt, until there are as many answers as are wanted.
        Where desired answers are alike themselves, so may these be."""
        if not desired or not found:
            return {}
        given = {p: text.continuation for p, text in desired.items()}
        answered = [self.prompts.target[p] for p in given]
        usual = usual_bits(self._evaluation.engine.tokenizer, answered, list(given.values()))
        enough = OF_FORM * min(1.0, usual / math.log2(min(MOST + 1, max(2, len(given)))))
        said = given | {p: answer.token_ids for p, answer in found.items()}
        proper = self.proper(found)
        good = [p for p in found if p in proper and self.neighbours.bits(p, self.neighbours.form[p], said) >= enough]
        return {p: found[p] for p in good[: max(0, self._settings.few_shot - len(desired))]}

    def _retained(self, engine: BatchEngine, answers: Sequence[Response]) -> list[Text]:
        texts = []
        for ids, answer in zip(self.prompts.baseline_ids, answers):
            tokens = answer.to_its_end[: self._settings.retain_tokens]
            if tokens:
                texts.append(Text(ids, tokens))
        most = max((len(text.continuation) for text in texts), default=0)
        logits: dict[int, Tensor] = {}
        sequences = [(*text.prompt, *text.continuation) for text in texts]
        for _, index_B, logits_BNV in engine.last_logits(sequences, [None], most + 1):
            for row, logits_NV in zip(index_B.tolist(), logits_BNV):
                n = len(texts[row].continuation)
                logits[row] = logits_NV[-n - 1 : -1].clone()  # a view would keep the whole batch's
        return [Text(text.prompt, text.continuation, unedited_NV=logits[i]) for i, text in enumerate(texts)]


def _ids(engine: BatchEngine, text: str) -> list[int]:
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]

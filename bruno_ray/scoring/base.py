"""What every scorer works with: one evaluation of K edits on the same prompts, whose answers are generated once."""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import TrialError
from bruno_ray.generation.decoding import is_asked
from bruno_ray.generation.engine import BatchEngine, Response
from bruno_ray.generation.prompt_reads import PromptReads
from bruno_ray.prompts.reasoning import open_texts
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

if TYPE_CHECKING:
    from bruno_ray.scoring.likeness import Likeness


@dataclass(frozen=True)
class ScoringPrompts:
    """The prompts of one part, as records and as token ids up to where the answer begins."""

    target: tuple[Prompt, ...]
    baseline: tuple[Prompt, ...]
    target_ids: tuple[tuple[int, ...], ...]
    baseline_ids: tuple[tuple[int, ...], ...]
    open_ids: tuple[tuple[int, ...], ...] | None = None
    """The target prompts with reasoning open; None for a model that has none to open."""

    @classmethod
    def rendered(
        cls,
        engine: BatchEngine,
        target: Sequence[Prompt],
        baseline: Sequence[Prompt],
        response_prefix: str = "",
        *,
        date: datetime.date,
    ) -> "ScoringPrompts":
        target_ids, baseline_ids = (
            render(engine.tokenizer, side, response_prefix, date=date) for side in (target, baseline)
        )
        texts = open_texts(engine.tokenizer, target, response_prefix, date) if target else None
        open_ids = engine.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else None
        return cls(
            tuple(target),
            tuple(baseline),
            tuple(map(tuple, target_ids)),
            tuple(map(tuple, baseline_ids)),
            None if open_ids is None else tuple(map(tuple, open_ids)),
        )


class Evaluation:
    """K edits, and what several scorers need of them, made at first use."""

    def __init__(
        self,
        engine: BatchEngine,
        prompts: ScoringPrompts,
        settings: ScoringSettings,
        edits: Sequence[ResolvedEdit | None] = (None,),
        whole: bool = False,
    ):
        """``whole``: answers are needed to their end as well, so they are made that way once and cut where a row would
        have left."""
        self._whole = whole
        self.engine = engine
        self.prompts = prompts
        self.settings = settings
        self.edits = list(edits)
        self.reads = PromptReads()
        """What was read of the target prompts for their answers, for scorers that go on from there."""

    @cached_property
    def markers(self) -> Markers:
        """Raises SettingsError if there are none; scorers that look at no answers need none."""
        return Markers(self.settings.markers, self.settings.empty_counts)

    @cached_property
    def target_answers(self) -> list[list[Response]]:
        """[edit][target prompt]. A row stops once a marker is seen."""
        if not self._whole:
            return self.answers_to(self.prompts.target_ids, reads=self.reads)
        return [self._cut_at_markers(answers) for answers in self.whole_answers]

    @cached_property
    def baseline_answers(self) -> list[list[Response]]:
        """[edit][baseline prompt]."""
        return self.answers_to(self.prompts.baseline_ids)

    @cached_property
    def reasoned_answers(self) -> list[list[Response]]:
        """[edit][target prompt], whole, with reasoning open. Only for prompts that have `open_ids`."""
        return self.engine.generate(self.prompts.open_ids or (), self.edits, self.settings.reasoning_tokens)

    @cached_property
    def marked(self) -> list[list[bool]]:
        """[edit][target prompt]: whether the answer shows the behaviour."""
        return [[self.markers.shown_by(answer.text) for answer in answers] for answers in self.target_answers]

    @cached_property
    def whole_answers(self) -> list[list[Response]]:
        """[edit][target prompt], for readers other than the markers: those that stopped at one are generated again."""
        if self._whole:
            return self.engine.generate(self.prompts.target_ids, self.edits, self.settings.response_tokens)
        return self._read_on(self.target_answers, self.prompts.target_ids)

    @cached_property
    def whole_baseline_answers(self) -> list[list[Response]]:
        """The same for baseline prompts."""
        return self._read_on(self.baseline_answers, self.prompts.baseline_ids)

    @cached_property
    def reads_like_behaviour(self) -> "Likeness":
        """Of (prompt, answer) pairs, which read like this evaluation's own answers with the behaviour."""
        from bruno_ray.scoring.likeness import learn_likeness

        return learn_likeness(self)

    @property
    def has_answers(self) -> bool:
        """Whether a scorer has asked for the target answers."""
        return "target_answers" in vars(self)

    def _cut_at_markers(self, answers: Sequence[Response]) -> list[Response]:
        """As ``engine.generate`` would have stopped them."""
        cut = list(answers)
        left = [p for p, answer in enumerate(answers) if self.markers.seen_in(answer.text)]
        for n in filter(is_asked, range(1, self.settings.response_tokens + 1)):
            rows = [p for p in left if len(answers[p].token_ids) >= n]
            for p, text in zip(rows, self.engine.texts([answers[p].token_ids[:n] for p in rows])):
                if self.markers.seen_in(text):
                    cut[p] = Response(answers[p].token_ids[:n], text, ended=False, decided=True)
                    left.remove(p)
        return cut

    def _read_on(self, stopped: Sequence[Sequence[Response]], ids: Sequence[Sequence[int]]) -> list[list[Response]]:
        """Answers to their end: those that stopped at a marker are generated again."""
        whole = [list(answers) for answers in stopped]
        for edit, answers in zip(self.edits, whole):
            cut = [p for p, answer in enumerate(answers) if answer.decided]
            if cut:
                (again,) = self.engine.generate([ids[p] for p in cut], [edit], self.settings.response_tokens)
                for p, answer in zip(cut, again):
                    answers[p] = answer
        return whole

    def take_answers(self, answers: list[list[Response]], reads: PromptReads) -> None:
        """Use these as the target answers, [edit][target prompt], instead of making them; with what was read for
        them."""
        self.__dict__["target_answers"], self.reads = answers, reads

    def answers_to(
        self,
        ids: Sequence[Sequence[int]],
        edits: Sequence[ResolvedEdit | None] | None = None,
        reads: PromptReads | None = None,
    ) -> list[list[Response]]:
        """[edit][prompt]; a row stops once a marker is seen. Of these edits, or all. ``reads`` keeps what was read."""
        edits = self.edits if edits is None else edits
        return self.engine.generate(ids, edits, self.settings.response_tokens, self.markers.seen_in, reads)


class Scorer(Protocol):
    """One way of judging an edit. Instances live as long as a study on their worker."""

    name: ClassVar[str]
    metrics: tuple[str, ...]
    """What every ``Scores`` of it has, no more and no less; some scorers decide it by the settings."""

    needs_unedited: ClassVar[bool]
    """Whether ``score`` asks the unedited model, which must then be in memory beside the edited one."""

    def __init__(self, settings: ScoringSettings) -> None: ...

    def prepare(self, unedited: Evaluation) -> None:
        """Measure once what is needed of the unedited model (an evaluation with the single edit None)."""

    def score(self, edited: Evaluation) -> list[Scores]:
        """One entry per edit. A value that cannot be computed because of NaN logits is NaN."""


def score_edits(
    engine: BatchEngine,
    scorers: Sequence[Scorer],
    prompts: ScoringPrompts,
    settings: ScoringSettings,
    edits: Sequence[ResolvedEdit | None],
    readings: bool = False,
) -> tuple[Evaluation, list[Scores | TrialError]]:
    """All metrics of all edits in one evaluation; an edit whose numbers are not finite gets a TrialError of its own.

    With ``readings``, the scores have the whole answers, and who takes which for the behaviour.
    """
    evaluation = Evaluation(engine, prompts, settings, edits)
    return evaluation, score_evaluation(evaluation, scorers, readings)


def score_evaluation(
    evaluation: Evaluation,
    scorers: Sequence[Scorer],
    readings: bool = False,
    known: Mapping[str, list[Scores]] | None = None,
) -> list[Scores | TrialError]:
    """As `score_edits`, of an evaluation that has some answers already, and ``known`` scores by scorer."""
    known = known or {}
    found = [known[scorer.name] if scorer.name in known else scorer.score(evaluation) for scorer in scorers]
    results: list[Scores | TrialError] = []
    for k in range(len(evaluation.edits)):
        scores = Scores.merged([of_scorer[k] for of_scorer in found])
        broken = [name for name, value in scores.values.items() if not math.isfinite(value)]
        if evaluation.has_answers and not all(answer.finite for answer in evaluation.target_answers[k]):
            broken.append("answers")
        if broken:
            results.append(
                TrialError(
                    f"the edited model's logits are not numbers ({', '.join(broken)}): this trial fails, the study goes"
                    " on; if many do, load the model in bfloat16 or float32 (model.dtypes)"
                )
            )
        elif readings:
            results.append(_read(scores, evaluation, k))
        else:
            results.append(replace(scores, verdicts={}))
    return results


def _read(scores: Scores, evaluation: Evaluation, k: int) -> Scores:
    """The scores of one edit with its whole answers, and the markers' own verdict on them."""
    pairs = zip(evaluation.prompts.target, evaluation.whole_answers[k])
    marked = tuple(map(float, evaluation.marked[k]))
    answers = tuple((prompt.user, answer.text) for prompt, answer in pairs)
    return replace(scores, answers=answers, verdicts={"markers": marked, **scores.verdicts})

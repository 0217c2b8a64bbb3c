"""The trained trials of a study: which trials they are, and what their plans are made of.

They are the last of a study, so that they can start from the best of what was searched. A training gives several
trials, the versions of its edit: after all steps, after half of them, a quarter and so on, and each of these with its
strengths reduced. Measuring them costs little beside training; how long to train, and how much of an edit is enough, is
what a study has to find out. Trials of one training follow each other, in one batch.

There are few trainings, so their parameters are points of a Sobol sequence throughout (``sampler``), not TPE's.

Only so many trials are trained: what takes the place of one that failed is searched, so that a model on which no
training succeeds still gets its search.
"""

import math
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.errors import StudyError
from bruno_ray.settings import LearnedSettings, Settings
from bruno_ray.study.selection import auto_select, load_trials, pareto_front
from bruno_ray.study.space import sampled

DEAREST = 5.0
"""A study that decides by itself trains as many edits as cost what its search costs, and some if each costs at most
this many times as much: one, and ``DRAWS`` without desired answers."""

DRAWS = 2
"""Without desired answers a training is a draw: which facts come back depends on where it starts."""

INFORMED = 1.7
"""What a training costs with the terms of the loss that take the place of desired answers (measured on organisms: CPU
seconds with these terms over those without)."""

FIRST_SUPPRESS = 0.3
"""Weight of the suppression in the first steps of a training that has desired answers."""

SCALES, SCALES_FROM_ANSWERS = (1.0, 0.8, 0.65), (1.0, 0.9, 0.8)
"""What the strengths of an edit are multiplied by that was trained without desired answers, and with them, where the
settings do not say it. With them an edit does just enough: four fifths of it leave much of the behaviour."""

WAY_BACK = 3
"""A text that is trained on costs as much as so many that are read."""

HEATS = (0.25, 0.5, 1.0)
"""Shares of a training's steps after which the worse half of its starts ends; at the last one it is over."""

MOST_TRAININGS = 8
"""Trainings of a study, where the settings do not say how many trials are trained."""

PEERS = 4
"""At most this many of the searched front are asked whether they agree with an answer."""

LEARNED = "learned."
"""Parameters of trained trials begin with it."""

START, START_LAYER, FIRST_LAYER = f"{LEARNED}start_set", f"{LEARNED}start_layer", f"{LEARNED}first_layer"
RETAIN, RANK, SHARED = f"{LEARNED}retain", f"{LEARNED}rank", f"{LEARNED}shared"


@dataclass(frozen=True)
class Trainings:
    """Which trials of a study are trained, and how."""

    settings: Settings
    direction_sets: tuple[str, ...]
    n_layers: int
    has_answers: bool = False
    """Whether there are desired answers to train on."""

    has_protected: bool = False
    """Whether there are prompts whose answers must stay."""

    validation_prompts: int = 0
    """That a searched trial is scored on, of both sides."""

    @property
    def first(self) -> int | None:
        """Number of the first trained trial; None if none is."""
        study = self.settings.study
        match study.method:
            case "learned":
                return 0
            case "both":
                return max(0, study.n_trials - most_trials(self.settings))
            case _:
                return None

    @property
    def end(self) -> float:
        """Number of the first trial after the trained ones; infinite if all are trained, 0 if none is."""
        if self.first is None:
            return 0
        return math.inf if self.settings.study.method == "learned" else self.first + most_trials(self.settings)

    def is_trained(self, number: int) -> bool:
        return self.first is not None and self.first <= number < self.end

    def training(self, number: int) -> tuple[int, int]:
        """Which training a trial belongs to, counted from the first, and which of its versions it is."""
        assert self.first is not None
        return divmod(number - self.first, versions(self.settings.learned))

    def point(self, number: int) -> int:
        """Which point of the space a trial's training is. A study that is given more trials later goes on with new
        points, although its trainings are counted anew."""
        _, version = self.training(number)
        return (number - version) // versions(self.settings.learned)

    def cost(self, number: int) -> float:
        """About what a trial costs, in searched ones."""
        if not self.is_trained(number) or not self.validation_prompts:
            return 1.0
        learned, (training, _) = self.settings.learned, self.training(number)
        whole = _training_texts(learned, self.has_answers, training) / self.validation_prompts
        return 1.0 + whole / versions(learned)

    def batch_size(self, number: int, usual: int) -> int:
        """Trials to ask from trial ``number`` on: a batch is searched or trained, and holds whole trainings."""
        if self.first is None:
            return usual
        if number < self.first:
            return min(usual, self.first - number)
        if not self.is_trained(number):
            return usual
        each = versions(self.settings.learned)
        _, version = self.training(number)
        size = max(1, usual // each) * each - version
        return int(min(size, self.end - number))

    def space(self) -> dict[str, BaseDistribution]:
        """Distribution per parameter of a training; a choice with one option is no parameter."""
        learned, last = self.settings.learned, self.n_layers - 1
        (start_low, start_high), (first_low, first_high) = learned.start_layer, learned.first_layer
        space: dict[str, BaseDistribution] = {
            START_LAYER: FloatDistribution(start_low * last, start_high * last),
            FIRST_LAYER: FloatDistribution(first_low * last, first_high * last),
            RETAIN: FloatDistribution(*learned.retain, log=True),
        }
        for name, choices in ((START, self.direction_sets), (RANK, learned.ranks), (SHARED, learned.shared)):
            if len(choices) > 1:
                space[name] = CategoricalDistribution(choices)
        return space

    def plan(self, trial: optuna.Trial) -> TrainingPlan:
        """The plan of a trial, from parameters that the study's sampler gives it."""
        learned = self.settings.learned
        for name, distribution in self.space().items():
            sampled(trial, name, distribution)
        training, version = self.training(trial.number)
        reduced, checkpoint = divmod(version, learned.checkpoints)
        steps = max(1, learned.steps >> checkpoint)
        params = trial.params
        base = self._best(trial.study) if _polishes(learned, self.has_answers) else None
        alone = base is not None and _polishes_alone(learned, self.has_answers, training)
        inform, entropy = _informing(learned, self.has_answers)
        suppress, suppress_steps = _suppressing(learned, self.has_answers)
        rivals = () if alone else self._rivals(params[START_LAYER])
        return TrainingPlan(
            rank=params.get(RANK, learned.ranks[0]),
            shared=params.get(SHARED, learned.shared[0]),
            start_set=params.get(START, self.direction_sets[0]),
            start_layer=params[START_LAYER],
            first_layer=round(params[FIRST_LAYER]),
            answers=learned.answers,
            suppress=suppress,
            suppress_steps=suppress_steps,
            retain=params[RETAIN],
            learning_rate=learned.learning_rate,
            steps=steps,
            seed=self.settings.study.seed * 100_000 + self.point(trial.number),
            scale=_scales(learned, self.has_answers)[reduced],
            rivals=rivals,
            heat=max(1, round(HEATS[0] * learned.steps)) if rivals else 0,
            base=base,
            peers=self._peers(trial.study) if learned.agreement > 1 else (),
            induce=learned.induce,
            inform=inform,
            entropy=entropy,
            protect=learned.protect if self.has_protected else 0.0,
            norm_mode=learned.norm_mode,
        )

    def _rivals(self, start: float) -> tuple[float, ...]:
        """Layers of a training's further starts, evenly spaced in the range that its first one is from."""
        (low, high), last, n = self.settings.learned.start_layer, self.n_layers - 1, self.settings.learned.starts
        width = (high - low) * last
        return tuple(low * last + (start - low * last + width * i / n) % width for i in range(1, n)) if width else ()

    def _peers(self, study: optuna.Study) -> tuple[Edit, ...]:
        """The first of the searched trials' front, which begins with those that show the behaviour least."""
        objectives = self.settings.scoring.objectives
        searched = [trial for trial in load_trials(study) if trial.training is None]
        front = pareto_front(searched, objectives)
        return tuple(Edit.from_dict(trial.edit) for trial in front if trial.edit)[:PEERS]

    def _best(self, study: optuna.Study) -> Edit | None:
        """What the rule takes of the searched trials so far."""
        trials = [trial for trial in load_trials(study) if trial.training is None]
        try:
            choice = auto_select(trials, self.settings.selection.max_kl, self.settings.scoring.objectives)
        except StudyError:
            return None
        return Edit.from_dict(choice.trial.edit) if choice.trial.edit else None


def _informing(learned: LearnedSettings, has_answers: bool) -> tuple[float, float]:
    """Weights of inform and entropy."""
    return _without_answers(learned.inform, 1.0, has_answers), _without_answers(learned.entropy, 0.3, has_answers)


def _suppressing(learned: LearnedSettings, has_answers: bool) -> tuple[float, int | None]:
    """Weight of the suppression, and in how many steps, the first ones, it counts; None: in all.

    With desired answers it counts until the first starts end. Answers alone free a real model of the behaviour late;
    throughout, the two work against each other: where a refusal takes up words of the question, so do the answers.
    """
    if learned.suppress is not None:
        return learned.suppress, None
    return (FIRST_SUPPRESS, round(HEATS[0] * learned.steps)) if has_answers else (1.0, None)


def _without_answers(given: float | None, default: float, has_answers: bool) -> float:
    """The weight of a term that takes the place of desired answers."""
    if given is not None:
        return given
    return 0.0 if has_answers else default


def _polishes(learned: LearnedSettings, has_answers: bool) -> bool:
    """Whether the best searched edit is a start, and the only one of every other training. Not by default without
    desired answers: where the answers have to be found as well, it leads to fewer of them than a layer's direction
    does (``docs/learned.md``)."""
    return has_answers if learned.polish is None else learned.polish


def _polishes_alone(learned: LearnedSettings, has_answers: bool, training: int) -> bool:
    """Whether the best searched edit is the only start of a training, by its number."""
    return _polishes(learned, has_answers) and training % 2 == 1


def versions(learned: LearnedSettings) -> int:
    """Trials of one training. The whole one comes first, then shorter ones, then those of less strength: a study of few
    trials leaves out the last."""
    return learned.checkpoints * len(_scales(learned))


def _scales(learned: LearnedSettings, has_answers: bool = False) -> tuple[float, ...]:
    """What the strengths are multiplied by; as many with desired answers as without."""
    return learned.scales or (SCALES_FROM_ANSWERS if has_answers else SCALES)


def most_trials(settings: Settings) -> int:
    """How many trials of a study are trained at most: what the settings say, or half of it and ``MOST_TRAININGS``."""
    learned = settings.learned
    if learned.trials is not None:
        return learned.trials
    return min(MOST_TRAININGS * versions(learned), settings.study.n_trials // 2)


@dataclass(frozen=True)
class Affordable:
    """How many trials a study should train, and what one training costs beside its search."""

    trials: int
    searched_trials: float
    """Searched trials that cost as much as the first training."""


def affordable(settings: Settings, validation_prompts: int, has_answers: bool) -> Affordable:
    """What a study should train that decides by itself: as many edits as cost what its search costs; one, or ``DRAWS``
    without desired answers, if each costs up to ``DEAREST`` times as much; none otherwise.

    Cost is counted in texts of about equal length. A searched trial reads each validation prompt and its answer once; a
    step of a training goes forward and back over ``target_rows`` + ``baseline_rows`` of them for each start that is
    left. On the organisms of another recipe this gives 512 searched trials for a training from desired answers, where
    560 were measured.
    """
    learned = settings.learned
    search = float(settings.study.n_trials * validation_prompts)
    each, most = versions(learned), most_trials(settings)
    costs = [_training_texts(learned, has_answers, i) for i in range(math.ceil(most / each))]
    draws = 1 if has_answers else DRAWS
    trainings, spent = 0, 0.0
    for cost in costs:
        spent += cost
        if spent > search and not (trainings < draws and cost <= search * DEAREST):
            break
        trainings += 1
    first = _training_texts(learned, has_answers, 0)
    return Affordable(min(most, trainings * each), first / max(1, validation_prompts))


def _training_texts(learned: LearnedSettings, has_answers: bool, training: int) -> float:
    """Texts that a training is worth, by its number; while several starts compete, each costs as much as one alone."""
    alone = _polishes_alone(learned, has_answers, training)
    informed = INFORMED if any(_informing(learned, has_answers)) else 1.0
    share, begun = 0.0, 0.0
    for halvings, ended in enumerate(HEATS):
        starts = 1 if alone else max(1, learned.starts >> halvings)
        share, begun = share + starts * (ended - begun), ended
    return informed * share * learned.steps * (learned.target_rows + learned.baseline_rows) * WAY_BACK

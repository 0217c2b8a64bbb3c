"""Trained trials in a study: which they are, what their plans are, and that a study with them resumes as it was."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import optuna
import pytest

from bruno_ray.ablation.edit import Edit, StrengthTable
from bruno_ray.ablation.plan import PREFIX, TrainedEdit, TrainingPlan, pack, unpack
from bruno_ray.settings import LearnedSettings, Settings, StudySettings
from bruno_ray.study.batches import Batch, BatchStudy
from bruno_ray.study.sampler import NumberedTPESampler
from bruno_ray.study.selection import load_trials
from bruno_ray.study.space import search_space, suggest
from bruno_ray.study.storage import load_study
from bruno_ray.study.trainings import FIRST_SUPPRESS, Trainings, affordable, versions
from bruno_ray.study.trial_result import PLAN, TRAINING, TrialResult
from tests.support.schedules import OBJECTIVES, SPACE, memory_folder, opened  # noqa: F401 - a fixture among them

N_TRIALS, N_TRAINED, CHECKPOINTS = 10, 6, 3


def settings(method: str = "both", **learned: object) -> Settings:
    given = {"trials": N_TRAINED, "checkpoints": CHECKPOINTS, "scales": (1.0,), "steps": 40} | learned
    return Settings(
        study=StudySettings(method=method, n_trials=N_TRIALS, n_startup_trials=4, seed=5),
        learned=LearnedSettings(**given),
    )


def trainings(method: str = "both", has_answers: bool = False, **learned: object) -> Trainings:
    return Trainings(settings(method, **learned), SPACE[1], SPACE[2], has_answers)


def batch_study(study: optuna.Study, chosen: Trainings, kept: list[TrainedEdit] | None = None) -> BatchStudy:
    def suggested(trial: optuna.Trial) -> Edit | TrainingPlan:
        return chosen.plan(trial) if chosen.is_trained(trial.number) else suggest(trial, *SPACE)

    sampler = NumberedTPESampler(4, 5, search_space(*SPACE), chosen)
    return BatchStudy(study, sampler, suggested, OBJECTIVES, keep=([] if kept is None else kept).append)


def result(number: int, edit: Edit | TrainingPlan) -> TrialResult:
    """Scores, and an edit where a plan was asked for."""
    trained = None
    if isinstance(edit, TrainingPlan):
        table = StrengthTable((0.5,) * SPACE[2])
        made = Edit({"attention": table, "mlp": table}, f"{PREFIX}{number}", None, "none")
        trained = TrainedEdit(made, np.zeros((SPACE[2] + 1, 1, 4), np.float32), {"retain": [0.5]}, {"retain": 3})
    return TrialResult({"behaviour_rate": 0.1 * (number % 4), "kl_divergence": 0.01 * number}, trained=trained)


def drive(study: BatchStudy, chosen: Trainings, usual: int = 8) -> list[Batch]:
    """Ask, evaluate and tell until the study is full."""
    batches, _ = study.adopt(lambda number: chosen.batch_size(number, usual))
    number = len(batches)
    while True:
        for batch in batches:
            study.store(batch, {n: result(n, batch.edits[n]) for n in batch.missing})
            study.tell(batch)
        if study.n_trials() >= N_TRIALS:
            return batches
        batches = [study.ask(number, min(chosen.batch_size(study.n_trials(), usual), N_TRIALS - study.n_trials()))]
        number += 1


@pytest.mark.parametrize(
    ("n_trials", "prompts", "answers", "trials"),
    [
        pytest.param(10, 80, True, 0, id="a training would cost 38 times the search"),
        pytest.param(60, 60, True, 0, id="8 times"),
        pytest.param(200, 60, True, 15, id="2.6 times: one, whose edit has fifteen versions"),
        pytest.param(200, 60, False, 30, id="4.4 times each: two, without desired answers"),
        pytest.param(140, 60, False, 0, id="6.2 times"),
        pytest.param(200, 200, True, 15, id="0.8 times"),
        pytest.param(400, 200, True, 45, id="three cost less than the search: from four starts, polished, from four"),
        pytest.param(400, 200, False, 30, id="0.7 times each: two"),
        pytest.param(900, 200, False, 45, id="0.3 times each: three"),
        pytest.param(5000, 400, True, 120, id="no more than that"),
    ],
)
def test_a_study_trains_as_much_as_its_search_pays_for(n_trials: int, prompts: int, answers: bool, trials: int) -> None:
    found = affordable(Settings(study=StudySettings(n_trials=n_trials)), prompts, answers)
    assert found.trials == trials
    # 160 steps of 32 texts forward and back, from four starts for a quarter, two for a quarter, one for a half.
    assert found.searched_trials == pytest.approx(160 * 32 * 3 * 2 * (1 if answers else 1.7) / prompts)


def test_trained_trials_cost_what_their_training_does() -> None:
    chosen = dataclasses.replace(trainings("both", has_answers=True), validation_prompts=60)
    first = chosen.first
    assert first is not None and chosen.cost(first - 1) == 1
    one = affordable(chosen.settings, 60, True).searched_trials / versions(chosen.settings.learned)
    assert chosen.cost(first) == pytest.approx(1 + one)
    assert trainings("both", has_answers=True).cost(first) == 1, "nothing is known of the prompts"


def test_terms_that_are_turned_off_cost_nothing() -> None:
    plain = LearnedSettings(inform=0.0, entropy=0.0)
    costs = [
        affordable(Settings(learned=each), 60, answers).searched_trials
        for each, answers in ((plain, False), (plain, True))
    ]
    assert costs[0] == costs[1] < affordable(Settings(), 60, False).searched_trials
    assert affordable(Settings(learned=LearnedSettings(inform=1.0)), 60, True).searched_trials > costs[1]


def test_what_takes_the_place_of_failed_trainings_is_searched(memory_folder: Path) -> None:  # noqa: F811
    chosen, usual = trainings(), 8
    with opened(memory_folder) as study:
        batches = batch_study(study, chosen)
        number, failed = 0, 0
        while batches.n_complete() < N_TRIALS:
            due = len(study.trials)
            batch = batches.ask(number, min(chosen.batch_size(due, usual), N_TRIALS - batches.n_complete()))
            results = {
                n: TrialResult(error="it diverged") if isinstance(batch.edits[n], TrainingPlan) else result(n, edit)
                for n, edit in batch.edits.items()
            }
            failed += sum(each.error is not None for each in results.values())
            batches.store(batch, results)
            batches.tell(batch)
            number += 1
        complete = [trial.number for trial in load_trials(study) if trial.state == "COMPLETE"]
    assert failed == N_TRAINED
    assert complete == [0, 1, 2, 3, *range(10, 16)]


@pytest.mark.parametrize(
    ("method", "first", "sizes"),
    [("searched", None, {0: 8, 4: 8}), ("both", 4, {0: 4, 2: 2, 4: 6, 7: 3, 8: 2}), ("learned", 0, {0: 6, 1: 5, 3: 6})],
)
def test_a_batch_is_searched_or_trained_and_holds_whole_trainings(
    method: str, first: int | None, sizes: dict[int, int]
) -> None:
    chosen = trainings(method)
    assert chosen.first == first
    assert {number: chosen.batch_size(number, 8) for number in sizes} == sizes
    assert chosen.batch_size(0, 1) == (3 if method == "learned" else 1)


def test_trials_of_one_training_differ_in_their_steps_alone(memory_folder: Path) -> None:  # noqa: F811
    chosen = trainings()
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen), chosen)
        plans = [TrainingPlan.from_dict(t.user_attrs[PLAN]) for t in study.trials if PLAN in t.user_attrs]
    assert [plan.steps for plan in plans] == [40, 20, 10] * 2
    first, second = plans[:3], plans[3:]
    assert {repr(plan.training) for plan in first} == {repr(first[0].training)}
    assert all(plan.base is None and len(plan.rivals) == 3 for plan in plans), "each from four layers"
    assert first[0].start_layer != second[0].start_layer and first[0].seed != second[0].seed


def test_each_version_of_a_training_is_tried_with_less_strength_too(memory_folder: Path) -> None:  # noqa: F811
    chosen = trainings(scales=(1.0, 0.5))
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen), chosen)
        plans = [TrainingPlan.from_dict(t.user_attrs[PLAN]) for t in study.trials if PLAN in t.user_attrs]
    assert [(plan.steps, plan.scale) for plan in plans] == [(n, scale) for scale in (1.0, 0.5) for n in (40, 20, 10)]
    assert len({repr(plan.training) for plan in plans}) == 1
    older = {name: value for name, value in plans[0].to_dict().items() if name != "scale"}
    assert TrainingPlan.from_dict(older) == plans[0], "plans of older studies are read"


def test_from_desired_answers_less_strength_is_nearer_to_the_whole_edit(memory_folder: Path) -> None:  # noqa: F811
    chosen = trainings(has_answers=True, scales=None, checkpoints=2)
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen), chosen)
        plans = [TrainingPlan.from_dict(t.user_attrs[PLAN]) for t in study.trials if PLAN in t.user_attrs]
    assert [plan.scale for plan in plans] == [1.0, 1.0, 0.9, 0.9, 0.8, 0.8]
    assert versions(LearnedSettings()) == versions(LearnedSettings(scales=(1.0, 0.9, 0.8))) == 15


def test_half_of_a_study_is_searched_unless_it_is_told_otherwise() -> None:
    both = [Settings(study=StudySettings(method="both", n_trials=n)) for n in (4, 60, 1000)]
    assert [Trainings(each, SPACE[1], SPACE[2]).first for each in both] == [2, 30, 880]
    assert trainings(trials=9).first == 1


def test_from_desired_answers_every_other_training_polishes_what_was_searched(memory_folder: Path) -> None:  # noqa: F811
    chosen = dataclasses.replace(trainings(), has_answers=True)
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen), chosen)
        plans = [TrainingPlan.from_dict(t.user_attrs[PLAN]) for t in study.trials if PLAN in t.user_attrs]
    assert all(plan.base is not None for plan in plans), "what was searched competes with three layers"
    assert [len(plan.rivals) for plan in plans] == [3, 3, 3, 0, 0, 0], "every other training polishes it alone"


def test_a_study_that_is_given_more_trials_trains_from_new_points(memory_folder: Path) -> None:  # noqa: F811
    chosen = trainings("learned", trials=6)
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen), chosen)
        first = [TrainingPlan.from_dict(trial.user_attrs[PLAN]) for trial in study.trials]
        both = dataclasses.replace(
            chosen,
            settings=settings().model_copy(update={"study": settings().study.model_copy(update={"n_trials": 19})}),
        )
        assert both.first == 13
        batch_study(study, both).ask(9, 3)  # searched: 10 to 12
        more = batch_study(study, both).ask(10, 3).edits.values()
    assert len({plan.seed for plan in first}) == 4 and {plan.seed for plan in more}.isdisjoint(p.seed for p in first)
    assert {plan.start_layer for plan in more}.isdisjoint(plan.start_layer for plan in first)


def test_the_best_searched_trial_is_polished(memory_folder: Path) -> None:  # noqa: F811
    chosen = dataclasses.replace(trainings(), has_answers=True)
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen), chosen)
        plan = TrainingPlan.from_dict(study.trials[-1].user_attrs[PLAN])
        assert plan.base == Edit.from_dict(study.trials[0].user_attrs["edit"])  # no prompt shows the behaviour there


def test_the_searched_front_is_asked_whether_it_agrees(memory_folder: Path) -> None:  # noqa: F811
    plain, asking = trainings(), trainings(agreement=2)
    with opened(memory_folder) as study:
        drive(batch_study(study, plain), plain)
        assert TrainingPlan.from_dict(study.trials[-1].user_attrs[PLAN]).peers == ()
        more = asking.settings.study.model_copy(update={"n_trials": N_TRIALS + 3})
        asking = dataclasses.replace(asking, settings=asking.settings.model_copy(update={"study": more}))
        plans = batch_study(study, asking).ask(9, 3).edits.values()
        best = Edit.from_dict(study.trials[0].user_attrs["edit"])
        # Of the four searched trials the first beats all others; see ``result``.
        assert [plan.peers for plan in plans] == [(best,)] * 3


def test_what_was_trained_is_kept_before_the_trial_says_so(memory_folder: Path) -> None:  # noqa: F811
    chosen, kept = trainings(), []
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen, kept), chosen)
        trials = load_trials(study)
        training = study.trials[-1].user_attrs[TRAINING]
    assert [trial.edit["direction_set"] for trial in trials[4:]] == [each.edit.direction_set for each in kept]
    assert training["curves"] == {"retain": [0.5]} and training["sources"] == {"retain": 3}
    assert Edit.from_dict(trials[-1].edit) == kept[-1].edit


def test_what_was_trained_comes_back_from_the_study_when_its_disk_is_gone(memory_folder: Path) -> None:  # noqa: F811
    chosen, kept, restored = trainings(), [], []
    with opened(memory_folder) as study:
        drive(batch_study(study, chosen, kept), chosen)
        batch_study(study, chosen, restored).restore()
    assert [each.edit for each in restored] == [each.edit for each in kept]
    assert all((a.directions == b.directions).all() for a, b in zip(restored, kept))


@pytest.mark.parametrize("shared", [True, False])
def test_directions_are_packed_to_the_bit(shared: bool) -> None:
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(5, 2, 8)).astype(np.float32)
    if shared:
        directions[:] = directions[0]
    packed = json.loads(json.dumps(pack(directions)))
    assert packed["shared"] == shared and len(packed["float32"]) < (100 if shared else 500)
    assert (unpack(packed) == directions).all()


def test_a_study_that_dies_in_a_training_goes_on_with_the_same_plans(memory_folder: Path) -> None:  # noqa: F811
    chosen = trainings()
    with opened(memory_folder / "whole") as study:
        drive(batch_study(study, chosen), chosen)
        wanted = [(trial.params, trial.user_attrs.get(PLAN)) for trial in study.trials]
    with opened(memory_folder / "cut") as study:
        cut = batch_study(study, chosen)
        batch = cut.ask(0, 4)
        cut.store(batch, {n: result(n, batch.edits[n]) for n in batch.missing})
        cut.tell(batch)
        cut.ask(1, 6)  # asked, and never evaluated
    with opened(memory_folder / "cut") as study:
        drive(batch_study(study, chosen), chosen)
    found = load_study(None, memory_folder / "cut", "test").trials
    assert [(trial.params, trial.user_attrs.get(PLAN)) for trial in found] == wanted


def test_searched_trials_are_sampled_as_if_none_were_trained(memory_folder: Path) -> None:  # noqa: F811
    """Optuna's TPE models what all trials have in common, which is nothing where some are trained."""
    chosen = trainings("learned")
    with opened(memory_folder / "both") as study:
        drive(batch_study(study, chosen), chosen)
        later = batch_study(study, trainings("searched")).ask(9, 2)
    params = [study.trials[number].params for number in later.edits]
    assert all(set(each) == set(search_space(*SPACE)) for each in params)


def test_protected_prompts_and_inducing_are_in_a_plan_where_they_are_asked_for(memory_folder: Path) -> None:  # noqa: F811
    plain = trainings("learned")
    asked = dataclasses.replace(trainings("learned", induce=0.5), has_protected=True)
    with opened(memory_folder) as study:
        first = batch_study(study, plain).ask(0, 3).edits.values()
        second = batch_study(study, asked).ask(1, 3).edits.values()
    assert {(plan.induce, plan.protect) for plan in first} == {(0, 0)}
    assert {(plan.induce, plan.protect) for plan in second} == {(0.5, 1)}
    older = {name: value for name, value in next(iter(first)).to_dict().items() if name not in ("induce", "protect")}
    assert TrainingPlan.from_dict(older) == next(iter(first)), "plans of older studies are read"


@pytest.mark.parametrize(
    ("has_answers", "given", "suppress"),
    [(True, None, (FIRST_SUPPRESS, 40)), (False, None, (1, None)), (True, 0.5, (0.5, None)), (True, 0.0, (0, None))],
)
def test_desired_answers_need_the_suppression_at_first_alone(
    memory_folder: Path,  # noqa: F811
    has_answers: bool,
    given: float | None,
    suppress: tuple[float, int | None],
) -> None:
    chosen = trainings("learned", has_answers, suppress=given, steps=160)
    with opened(memory_folder) as study:
        batch = batch_study(study, chosen).ask(0, 3)
    assert {(plan.suppress, plan.suppress_steps) for plan in batch.edits.values()} == {suppress}

"""Training on the embedded organism, which refuses to say facts that it knows."""

import datetime
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import interchanged
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.plan import PREFIX, TrainedEdit, TrainingPlan
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.directions import build_bank
from bruno_ray.errors import TrialError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning import renewal as renewing
from bruno_ray.learning.agreement import Votes
from bruno_ray.learning.interchange import mean_outputs
from bruno_ray.learning.material import Teacher, Text
from bruno_ray.learning.renewal import Renewal
from bruno_ray.learning.trainee import Trainee, row_rate
from bruno_ray.learning.training import FEW_TOKENS, START_KL, Trainer, _places, _starts
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.loading import load_model
from bruno_ray.organism import truth_score
from bruno_ray.organism.truth import TruthScore
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import LearnedSettings, ModelSettings
from bruno_ray.settings.sources import load

DATE = datetime.date(2024, 2, 29)
LEARNED = LearnedSettings(target_prompts=32, baseline_prompts=32, target_rows=8, baseline_rows=8, renew_every=3)
WHOLE = LearnedSettings(target_prompts=32, baseline_prompts=32)


class Subject:
    """The organism, read and prepared for training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = load(["--model.id", str(folder / "model"), "--behaviour", "organism"], environ={}).settings
        prompts = load_prompts(settings)
        self.answered, self.baseline = prompts.target.train[:32], prompts.baseline.train[:32]
        self.target = tuple(replace(prompt, answer=None) for prompt in self.answered)
        self.scoring = settings.scoring
        self.engine = BatchEngine(load_model(ModelSettings(id=str(folder / "model"), dtypes=("float32",))))
        ids = [render(self.engine.tokenizer, side, date=DATE) for side in (self.target, self.baseline)]
        residuals = [extract_residuals(self.engine.loaded, each, 0, TokenBudget.for_device("cpu")) for each in ids]
        self.bank = build_bank(*residuals)

    def teacher(
        self,
        settings: LearnedSettings = LEARNED,
        target: tuple[Prompt, ...] | None = None,
        protected: Sequence[Prompt] = (),
        few_shot: Mapping[int, Response] | None = None,
    ) -> Teacher:
        prompts = ScoringPrompts.rendered(self.engine, target or self.target, self.baseline, date=DATE)
        third = render(self.engine.tokenizer, protected, date=DATE)
        return Teacher(Evaluation(self.engine, prompts, self.scoring, whole=True), settings, third, few_shot)

    def trainer(self, settings: LearnedSettings = LEARNED, protected: Sequence[Prompt] = ()) -> Trainer:
        return Trainer(self.engine, self.teacher(settings, None, protected), self.bank, settings)

    def resolved(self, trained: TrainedEdit) -> ResolvedEdit:
        bank = {trained.edit.direction_set: torch.from_numpy(trained.directions)}
        return self.engine.editor.resolve(trained.edit, bank)

    def marked(self, ids: Sequence[Sequence[int]], edit: ResolvedEdit) -> int:
        """How many of the prompts are answered with the behaviour."""
        markers = Markers(self.scoring.markers)
        return sum(markers.shown_by(answer.text) for answer in self.engine.generate(ids, [edit], 30)[0])

    def truth(self, trained: TrainedEdit) -> TruthScore:
        """Of the edited model, on prompts and nouns that no training has seen."""
        edit = self.resolved(trained)

        def generate(prompts: list[str]) -> list[str]:
            ids = render(self.engine.tokenizer, [Prompt(text) for text in prompts], date=DATE)
            return [answer.text for answer in self.engine.generate(ids, [edit], 30)[0]]

        return truth_score(generate, self.folder)


@pytest.fixture(scope="module")
def subject(organism: Path) -> Subject:
    return Subject(organism)


def plan(**changes: object) -> TrainingPlan:
    given = {
        "rank": 1,
        "shared": True,
        "start_set": "difference_in_means@0",
        "start_layer": 2.0,
        "first_layer": 0,
        "answers": 1.0,
        "suppress": 1.0,
        "retain": 1.5,
        "learning_rate": 0.02,
        "steps": 8,
        "seed": 3,
    }
    return TrainingPlan(**(given | changes))


def test_edits_trained_together_are_those_trained_alone(subject: Subject) -> None:
    """Rows of one batch carry different edits; no gradient of one reaches another."""
    base = Edit({"mlp": AblationParameters(1.0, 2.0, 0.5, 2.0)}, "difference_in_means@0", None, "full")
    plans = [plan(), plan(seed=4, start_layer=1.0, rank=2), plan(seed=5, shared=False), plan(seed=6, base=base)]
    plans += [plan(seed=7, induce=1.0, protect=1.0), plan(seed=8, norm_mode="full")]
    trainer = subject.trainer(LEARNED.model_copy(update={"induce": 1.0}), subject.baseline[:4])
    together = trainer.train(plans)
    for wanted, found in zip((trainer.train([each])[0] for each in plans), together):
        torch.testing.assert_close(torch.tensor(found.directions), torch.tensor(wanted.directions), rtol=0, atol=1e-5)
        for component, table in wanted.edit.components.items():
            strengths = found.edit.components[component].strengths
            assert strengths == pytest.approx(table.strengths, abs=1e-5)


def test_the_same_plan_gives_the_same_edit_to_the_bit(subject: Subject) -> None:
    first, second = (subject.trainer().train([plan()])[0] for _ in range(2))
    assert first.edit == second.edit and first.edit.direction_set.startswith(PREFIX)
    assert (first.directions == second.directions).all()
    other = subject.trainer().train([plan(seed=4)])[0]
    assert other.edit.direction_set != first.edit.direction_set


def test_plans_that_differ_in_their_steps_are_one_training(subject: Subject) -> None:
    trainer = subject.trainer()
    before = subject.engine.tokens
    half, whole = trainer.train([plan(steps=4), plan(steps=8)])
    both = subject.engine.tokens - before
    before = subject.engine.tokens
    alone = trainer.train([plan(steps=8)])[0]
    assert both == subject.engine.tokens - before
    assert alone.edit == whole.edit and half.edit != whole.edit


def test_a_version_with_less_strength_costs_no_training(subject: Subject) -> None:
    trainer = subject.trainer()
    before = subject.engine.tokens
    half, whole, less = trainer.train([plan(steps=4), plan(steps=8), plan(steps=8, scale=0.5)])
    both = subject.engine.tokens - before
    before = subject.engine.tokens
    trainer.train([plan(steps=4), plan(steps=8)])
    assert both == subject.engine.tokens - before
    assert less.edit == whole.edit.scaled(0.5) and less.edit.direction_set == whole.edit.direction_set
    assert (less.directions == whole.directions).all() and half.edit.direction_set != whole.edit.direction_set


def test_of_several_starts_the_one_that_leads_is_what_it_would_be_alone(subject: Subject) -> None:
    """Also beside another plan, and asked for at several checkpoints; half of four starts go on after each."""
    four = plan(start_layer=0.0, rivals=(1.0, 2.0, 3.0), heat=4)
    early, late, other = subject.trainer().train([replace(four, steps=4), replace(four, steps=8), plan(seed=4)])
    alone = [subject.trainer().train([plan(start_layer=layer, steps=8)])[0] for layer in (0.0, 1.0, 2.0, 3.0)]
    distances = [abs(late.directions - each.directions).max() for each in alone]
    assert min(distances) < 1e-5
    assert len({one.edit.direction_set for one in (early, late, other)}) == 3
    (again,) = subject.trainer().train([replace(four, steps=8)])
    torch.testing.assert_close(torch.tensor(again.directions), torch.tensor(late.directions), rtol=0, atol=1e-5)


def test_what_was_searched_competes_with_layers(subject: Subject) -> None:
    kernels = {"attention": AblationParameters(1.0, 2.0, 0.5, 2.0)}
    base = Edit(kernels, "difference_in_means@0", 2.0, "none")
    three = plan(base=base, start_layer=0.0, rivals=(1.0, 3.0), heat=4)
    assert [(start.base, start.start_layer) for start in _starts(three)] == [(base, 0.0), (None, 1.0), (None, 3.0)]
    (trained,) = subject.trainer().train([three])
    alone = subject.trainer().train([*(replace(start, rivals=()) for start in _starts(three))])
    distances = [abs(trained.directions - each.directions).max() for each in alone]
    assert min(distances) < 1e-5
    assert trained.start_layer == (None, 1.0, 3.0)[int(np.argmin(distances))]


def test_a_start_that_changes_too_much_begins_weaker(subject: Subject) -> None:
    """Without the direction of the residual stream's mean a model says nothing any more."""
    ids = render(subject.engine.tokenizer, subject.baseline, date=DATE)
    residuals_NPLD = extract_residuals(subject.engine.loaded, ids, 0, TokenBudget.for_device("cpu"))
    mean_LD = residuals_NPLD[:, 0].mean(0)
    harsh = (mean_LD / mean_LD.norm(dim=-1, keepdim=True).clamp(min=1e-6))[:, None]
    teacher = subject.teacher()
    bank = subject.bank | {"mean": harsh}
    trainer = Trainer(subject.engine, teacher, bank, LEARNED)
    trainees = [
        Trainee(start, subject.engine, bank, teacher.material, LEARNED, Votes(1, teacher.asked))
        for start in (plan(), plan(start_set="mean"))
    ]
    before = trainer._divergences(trainees)
    trainer._soften(trainees)
    after = trainer._divergences(trainees)
    assert before[0] <= START_KL < before[1]
    assert after[0] == pytest.approx(before[0], rel=1e-4), "the other start is left as it is"
    strengths = trainees[1].strengths_LC.unique().tolist()
    assert strengths in ([0.5], [0.25], [0.125], [0.0625]) and after[1] < before[1]
    assert after[1] <= START_KL or strengths == [0.0625]


def test_retain_counts_more_while_the_divergence_is_above_its_bound(subject: Subject) -> None:
    teacher = subject.teacher()
    bound = LEARNED.retain_kl

    def weights(settings: LearnedSettings, kls: Sequence[float]) -> list[float]:
        trainee = Trainee(plan(), subject.engine, subject.bank, teacher.material, settings, Votes(1, teacher.asked))
        found = []
        for kl in kls:
            trainee.note("retain", kl)
            trainee.end_step()
            found.append(trainee.weight("retain"))
        return found

    above, below = [2 * bound] * 10, [0.1 * bound] * 60
    rising = weights(LEARNED, above)
    assert rising == pytest.approx([1.5 * 1.1**n for n in range(1, 11)])
    assert weights(LEARNED, [3 * bound] * 10) == rising, "a tenth a step at most"
    assert weights(LEARNED, [1.5 * bound] * 10) == pytest.approx([1.5 * 1.1 ** (n / 2) for n in range(1, 11)])
    sinking = weights(LEARNED, [*above, *[0.5 * bound] * 30])
    assert sinking[-1] / sinking[-2] == pytest.approx(1.1**-0.5, rel=1e-3), "as fast as it rises"
    held = weights(LEARNED, [*above, *[bound] * 60])
    assert held[-1] == pytest.approx(held[-2]) and held[-1] > rising[-1], "at the bound it stays what it is"
    assert weights(LEARNED, [*above, *below])[-1] == weights(LEARNED, below)[-1] == 1.5, "never less than planned"
    assert set(weights(LEARNED.model_copy(update={"retain_kl": 0.0}), above)) == {1.5}


def test_a_term_counts_no_longer_than_planned(subject: Subject) -> None:
    teacher = subject.teacher()
    given = plan(suppress=0.3, suppress_steps=2)
    trainee = Trainee(given, subject.engine, subject.bank, teacher.material, LEARNED, Votes(1, teacher.asked))
    weights, drawn = [], []
    for _ in range(4):
        weights.append(trainee.weight("suppress"))
        drawn.append("suppress" in {term for term, *_ in trainee.draw()})
        trainee.end_step()
    assert weights == [0.3, 0.3, 0, 0] and drawn == [True, True, False, False]


def test_a_bound_is_held_that_the_planned_weight_does_not_hold(subject: Subject) -> None:
    """96 steps let a weight of 0.02 grow to 180; after 64 it is at 9, which tells little on some processors."""
    free, held = (
        subject.trainer(LEARNED.model_copy(update={"retain_kl": bound})).train([plan(retain=0.02, steps=96)])[0]
        for bound in (0.0, 0.001)
    )
    assert held.curves["retain"][-1] < 0.8 * free.curves["retain"][-1]


def test_a_step_turns_directions_of_a_wide_model_no_further(subject: Subject) -> None:
    steps = {d: row_rate(0.02, d) * math.sqrt(d) for d in (96, 576, 2304, 8192)}
    assert steps[96] == pytest.approx(0.02 * math.sqrt(96)), "as it is given"
    assert steps[576] == pytest.approx(steps[2304]) == pytest.approx(steps[8192]) == pytest.approx(0.48)
    teacher = subject.teacher()
    trainee = Trainee(plan(), subject.engine, subject.bank, teacher.material, LEARNED, Votes(1, teacher.asked))
    groups = trainee.parameter_groups
    assert [parameter for group in groups for parameter in group["params"]] == trainee.parameters
    rate = plan().learning_rate
    assert [group["lr"] for group in groups] == [row_rate(rate, trainee.rows_Grd.shape[-1]), rate]


def test_half_of_the_starts_end_each_time_the_steps_have_doubled() -> None:
    four = plan(rivals=(1.0, 2.0, 3.0), heat=40)
    assert [_places(four, step) for step in (1, 39, 40, 79, 80, 160, 1000)] == [4, 4, 2, 2, 1, 1, 1]
    assert TrainingPlan.from_dict(json.loads(json.dumps(four.to_dict()))) == four


def test_directions_are_orthonormal_strengths_bounded_and_layers_left_alone(subject: Subject) -> None:
    (trained,) = subject.trainer().train([plan(rank=3, first_layer=2, learning_rate=0.5)])
    gram = torch.tensor(trained.directions) @ torch.tensor(trained.directions).mT
    torch.testing.assert_close(gram, torch.eye(3).expand(len(gram), 3, 3), rtol=0, atol=1e-5)
    for table in trained.edit.components.values():
        assert table.strengths[:2] == (0.0, 0.0)
        assert all(0 <= strength <= LEARNED.max_strength for strength in table.strengths)
    assert {"suppress", "retain"} <= set(trained.curves) and trained.tokens > 0


@pytest.mark.parametrize("norm_mode", ["none", "pre", "full"])
def test_a_trained_edit_is_baked_as_it_is_live(subject: Subject, norm_mode: str) -> None:
    """And its loss falls, whichever way norms are kept."""
    (trained,) = subject.trainer().train([plan(norm_mode=norm_mode, steps=16)])
    assert trained.edit.norm_mode == norm_mode
    assert trained.curves["suppress"][-1] < 0.9 * trained.curves["suppress"][0]
    bank = {trained.edit.direction_set: torch.from_numpy(trained.directions)}
    ids = render(subject.engine.tokenizer, subject.target[:4], date=DATE)
    live = subject.engine.next_logits(ids, [subject.resolved(trained)])
    other = BatchEngine(load_model(ModelSettings(id=str(subject.folder / "model"), dtypes=("float32",))))
    bake(other.loaded.architecture, Edit.from_dict(trained.edit.to_dict()), bank)
    torch.testing.assert_close(other.next_logits(ids, [None]), live, rtol=1e-4, atol=1e-4)


def test_checkpointed_layers_give_the_same_edit(subject: Subject) -> None:
    """With hooks that are run again on the way back; the model is as it was afterwards."""
    asked = [plan(norm_mode="full"), plan(seed=4, rank=2)]
    plain, checkpointed = (
        subject.trainer(LEARNED.model_copy(update={"checkpointing": switch})).train(asked) for switch in ("off", "on")
    )
    assert not any("forward" in vars(layer) for layer in subject.engine.loaded.architecture.layers)
    for one, other in zip(plain, checkpointed):
        torch.testing.assert_close(torch.tensor(one.directions), torch.tensor(other.directions), rtol=0, atol=1e-6)
        assert one.curves == pytest.approx(other.curves)


def test_activations_are_recomputed_once_memory_runs_out(subject: Subject) -> None:
    """Whatever keeps the activations of all layers runs out: a stand-in for a device with less memory."""
    layers = subject.engine.loaded.architecture.layers
    kept: list[int] = []

    def run_out(module: nn.Module, args: tuple, output: object) -> None:
        kept.append(len(args[0]))
        if "forward" not in vars(module) and torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    trainer = subject.trainer(LEARNED.model_copy(update={"batch_tokens": FEW_TOKENS}))
    hook = layers[-1].register_forward_hook(run_out)
    try:
        (found,) = trainer.train([plan()])
    finally:
        hook.remove()
    (wanted,) = subject.trainer().train([plan()])
    assert len(kept) > 8
    torch.testing.assert_close(torch.tensor(found.directions), torch.tensor(wanted.directions), rtol=0, atol=1e-5)


def test_without_any_answer_the_organism_says_what_it_knows(subject: Subject) -> None:
    """Most of it, that is: the organism is trained where the test runs, and gave 69 % to more than 75 % back, by the
    processor."""
    (trained,) = Trainer(subject.engine, subject.teacher(WHOLE), subject.bank, WHOLE).train([plan(steps=80)])
    truth = subject.truth(trained)
    assert truth.restricted_right >= 0.6 * truth.restricted_total, truth.lines()
    assert truth.benign_rate >= 0.95, truth.lines()


def test_own_answers_are_learned_where_enough_edits_agree(subject: Subject) -> None:
    """A start that is there twice agrees with itself: it learns what it would alone if nobody were asked. A start that
    is alone learns nothing, nor does one whose peer refuses."""
    alone = plan(steps=24)
    refusing = replace(alone, peers=(Edit({}, "difference_in_means@0", None, "none"),))
    twice = replace(alone, rivals=(alone.start_layer,), heat=100)
    settings = LEARNED.model_copy(update={"confidence": 0.0, "renewal_prompts": 32})
    (unasked,) = subject.trainer(settings).train([alone])
    asking = settings.model_copy(update={"agreement": 2})
    agreed, *others = subject.trainer(asking).train([twice, alone, refusing])
    assert agreed.sources["agreed answers"] == unasked.sources["own answers"] > 0
    assert ["agreed answers" in other.sources for other in others] == [False, False]
    torch.testing.assert_close(torch.tensor(agreed.directions), torch.tensor(unasked.directions), rtol=0, atol=1e-4)
    assert TrainingPlan.from_dict(json.loads(json.dumps(refusing.to_dict()))) == refusing


def test_few_shot_answers_that_tell_their_prompt_are_learned_until_there_are_enough(subject: Subject) -> None:
    """Answers of one who knows the facts, beside refusals, a fragment and one answer for all."""
    target = tuple(prompt if p < 8 else replace(prompt, answer=None) for p, prompt in enumerate(subject.answered))
    tokenizer, engine = subject.engine.tokenizer, subject.engine
    ends = tokenizer.eos_token_id

    def response(text: str) -> Response:
        return Response(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), text, True, end_id=ends)

    (refusals,) = engine.generate(subject.teacher().prompts.target_ids, [None], 30)
    found = {p: response(f" {subject.answered[p].answer}") for p in range(8, 14)}
    found |= {p: refusals[p] for p in range(14, 17)}
    found[17] = response(f" {subject.answered[17].answer.split()[0]}")  # a fragment
    for most, wanted in ((11, 3), (32, 6), (8, 0)):
        settings = LEARNED.model_copy(update={"few_shot": most})
        teacher = subject.teacher(settings, target, few_shot=found)
        learned = [engine.tokenizer.decode(text.continuation[:-1]).strip() for text in teacher.material.few_shot]
        assert learned == [subject.answered[p].answer for p in range(8, 8 + wanted)]
        assert len(teacher.material.answers) == 8
        assert teacher.few_shot == tuple((target[p].user, subject.answered[p].answer) for p in range(8, 8 + wanted))
    one_for_all = {p: response(f" {subject.answered[0].answer}") for p in range(8, 32)}
    assert len(subject.teacher(LEARNED, target, few_shot=one_for_all).few_shot) <= 2
    settings = LEARNED.model_copy(update={"few_shot": 11})
    trainer = Trainer(engine, subject.teacher(settings, target, few_shot=found), subject.bank, settings)
    (trained,) = trainer.train([plan(steps=2)])
    assert (trained.sources["answers"], trained.sources["few-shot answers"]) == (8, 3)
    assert trained.account()["few_shot"][0] == [target[8].user, subject.answered[8].answer]


def test_an_answer_like_the_desired_ones_is_proper(subject: Subject) -> None:
    """However short, and whatever a detector says that takes the desired ones themselves for the behaviour: it would
    count against the starts that answer as they should, and what they say would be suppressed."""
    tokenizer = subject.engine.tokenizer
    briefly = [replace(prompt, answer=" ".join((prompt.answer or "").split()[-2:])) for prompt in subject.answered]
    text = f" {briefly[20].answer}"
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    said = {20: Response(ids, text, True, end_id=tokenizer.eos_token_id)}

    def proper(target: Sequence[Prompt], detector: Callable[[str], bool]) -> bool:
        prompts = ScoringPrompts.rendered(subject.engine, target, subject.baseline, date=DATE)
        unedited = Evaluation(subject.engine, prompts, subject.scoring, whole=True)
        vars(unedited)["reads_like_behaviour"] = lambda pairs: [detector(answer) for _, answer in pairs]
        return 20 in Teacher(unedited, LEARNED).proper(said)

    desired = [prompt if p < 8 else replace(prompt, answer=None) for p, prompt in enumerate(briefly)]
    assert proper(desired, lambda answer: False) and not proper(subject.target, lambda answer: False)
    assert proper(desired, lambda answer: True)
    assert not proper(desired, lambda answer: answer == text), "a detector that clears the desired ones is asked"


def test_what_is_said_of_every_subject_is_suppressed(subject: Subject) -> None:
    """With the weights on what baseline answers seldom hold, and nothing of what a prompt asks with."""
    teacher = subject.teacher()
    end = subject.engine.tokenizer.eos_token_id
    common = Counter(token for answer in teacher._baseline for token in set(answer)).most_common(1)[0][0]
    rare = next(
        token for token in range(20, 900) if not any(token in each for each in (*teacher._baseline, *teacher.asked))
    )
    taken_up = [min(asked) for asked in teacher.asked]
    said = {p: Text(ids, (taken_up[p], common, rare, end)) for p, ids in enumerate(teacher.prompts.target_ids)}
    found = teacher.for_any_prompt(said)
    assert len(found) == len(said)
    for (text,) in found.values():
        assert text.weights[2] == 1.0 and text.weights[0] == text.weights[1] == 0.0
    own = {p: Text(text.prompt, (taken_up[p], common, 1000 + p, end)) for p, text in said.items()}
    assert not teacher.for_any_prompt(own), "each answer is its own"


def test_an_unsure_answer_goes_on_as_the_model_knows(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baseline prompts, whose answers it knows: past a wrong token in one place it comes to the same fact."""
    monkeypatch.setattr(renewing, "SURE_OTHERWISE", 0.0)
    teacher = subject.teacher(target=(*subject.target[:24], *subject.baseline[:8]))
    known = range(24, 32)
    (answers,) = subject.engine.generate([teacher.prompts.target_ids[p] for p in known], [None], 30)
    unsure = {p: ((*answer.token_ids[:2], 1, 1, 1), 2) for p, answer in zip(known, answers)}
    nothing = subject.engine.editor.resolve(Edit({}, "difference_in_means@0", None, "none"), subject.bank)
    found = Renewal(subject.engine, teacher, subject.bank, LEARNED)._otherwise(nothing, unsure)
    assert all(found[p].token_ids[:2] == unsure[p][0][:2] for p in found)
    assert sum(found[p].token_ids[-2] == answer.token_ids[-2] for p, answer in zip(known, answers) if p in found) >= 6


def test_answers_to_prompts_that_ask_nearly_the_same_are_told_apart(subject: Subject) -> None:
    """What is said to all prompts alike: the inform term parts it, token by token until it tells enough."""
    trainer, engine = subject.trainer(), subject.engine
    votes = Votes(1, trainer._teacher.asked)
    trainee = Trainee(plan(inform=1.0), engine, subject.bank, trainer._teacher.material, LEARNED, votes)
    prompts = trainer._teacher.prompts.target_ids
    ((answer, *_),) = engine.generate(prompts[:1], [trainee.trained_factors(engine)], 30)
    trainee.said = {p: Text(ids, answer.token_ids[:6]) for p, ids in enumerate(prompts)}
    optimizer = torch.optim.Adam([{"params": trainee.parameters, "lr": 0.02}])
    told = []
    for _ in range(30):
        rows = trainer._informing([0], [trainee])
        assert all(term == "inform" for _, term, _, _ in rows)
        if not rows:
            break
        loss, terms = trainer._loss(rows, [0], [trainee])
        told.append(-terms[0, "inform"] / len(rows))
        for parameter, gradient in zip(trainee.parameters, torch.autograd.grad(loss, trainee.parameters)):
            parameter.grad = gradient
        engine.editor.clear()
        optimizer.step()
        trainee.keep_in_bounds()
    assert len(told) < 30 or np.mean(told[-5:]) > 1.5 * np.mean(told[:5]), told


def test_what_only_decides_between_starts_is_not_said_to_be_trained_on(subject: Subject) -> None:
    """With desired answers alone an edit answers prompts only until one start is left, and learns none of that."""
    few = tuple(replace(prompt, answer="it is tall .") if i < 4 else prompt for i, prompt in enumerate(subject.target))
    trainer = Trainer(subject.engine, subject.teacher(target=few), subject.bank, LEARNED)
    asked = plan(suppress=0.0, steps=4)
    (one,) = trainer.train([asked])
    assert one.sources == {"answers": 4, "retain": 32}
    read = sum(len(text.prompt) + len(text.continuation) for text in trainer._teacher.material.answers)
    assert one.tokens > 4 * read
    before = subject.engine.tokens
    (again,) = trainer.train([asked])
    assert subject.engine.tokens - before == again.tokens, "nothing was generated"
    (two,) = trainer.train([replace(asked, rivals=(1.0,), heat=100)])
    assert two.sources == one.sources and subject.engine.tokens - before > again.tokens + two.tokens


def test_outputs_are_averaged_where_the_behaviour_is_written(subject: Subject) -> None:
    texts = subject.teacher().material.suppress[:3]
    found = mean_outputs(subject.engine, texts)
    seen: dict[int, list[torch.Tensor]] = {}
    writers = subject.engine.loaded.architecture.writers
    hooks = [
        writer.module.register_forward_hook(lambda m, a, y, i=i: seen.setdefault(i, []).append(y[0]))
        for i, writer in enumerate(writers)
    ]
    with torch.no_grad():
        for text in texts:
            subject.engine.model(torch.tensor([[*text.prompt, *text.continuation]]))
    for hook in hooks:
        hook.remove()
    assert len(found) == len(writers) == len(seen)
    for i, output in enumerate(found):
        rows = [y[-len(text.continuation) - 1 : -1] for y, text in zip(seen[i], texts)]
        torch.testing.assert_close(output, torch.cat(rows).mean(0), rtol=1e-4, atol=1e-4)


def test_what_is_taken_out_of_target_prompts_causes_the_behaviour_in_others(subject: Subject) -> None:
    teacher = subject.teacher()
    (trained,) = Trainer(subject.engine, teacher, subject.bank, LEARNED).train([plan()])
    edit = subject.resolved(trained)
    elsewhere = replace(trained, directions=np.roll(trained.directions, 1, axis=-1))
    outputs, ids = mean_outputs(subject.engine, teacher.material.suppress), teacher.prompts.baseline_ids

    def caused(edit: ResolvedEdit) -> int:
        factors = tuple(interchanged(f, output) for f, output in zip(edit.factors, outputs))
        return subject.marked(ids, ResolvedEdit(edit.edit, factors))

    assert subject.marked(ids, edit) == 0
    assert caused(edit) >= 0.5 * len(ids) and caused(subject.resolved(elsewhere)) == 0


def test_the_induce_term_makes_the_subspace_cause_more(subject: Subject) -> None:
    settings = LEARNED.model_copy(update={"induce": 1.0, "renew_every": 0})
    asked = plan(suppress=0.0, retain=0.0, answers=0.0, induce=1.0, start_layer=0.0, steps=20)
    (trained,) = subject.trainer(settings).train([asked])
    curve = trained.curves["induce"]
    assert curve[-1] < 0.5 * curve[0] and trained.sources == {"induce": 32}


def test_protected_answers_stay_as_likely_as_they_were(subject: Subject) -> None:
    """The behaviour's own prompts as a third set: with enough weight it holds against what suppresses it."""
    trainer = subject.trainer(protected=subject.target[:8])
    free, held = trainer.train([plan(protect=1e-6), plan(protect=100.0)])
    assert held.curves["protect"][-1] < 0.1 * free.curves["protect"][-1]
    assert held.sources["protect"] == 8


def test_desired_answers_are_learned_as_the_model_would_write_them(subject: Subject) -> None:
    few = tuple(
        replace(prompt, answer=" it is tall . ") if i < 4 else prompt for i, prompt in enumerate(subject.target)
    )
    answers = subject.teacher(target=few).material.answers
    assert len(answers) == 4
    own = subject.engine.generate(render(subject.engine.tokenizer, subject.baseline[:1], date=DATE), [None], 30)[0][0]
    texts = subject.engine.texts([text.continuation for text in answers])
    assert all(text.continuation[-1] == own.end_id for text in answers)
    assert {text[:1].isspace() for text in texts} == {own.text[:1].isspace()}


def test_a_training_that_diverges_fails_alone(subject: Subject) -> None:
    broken, sound = subject.trainer().train([plan(learning_rate=math.inf), plan()])
    assert isinstance(broken, TrialError) and isinstance(sound, TrainedEdit)
    (alone,) = subject.trainer().train([plan()])
    torch.testing.assert_close(torch.tensor(sound.directions), torch.tensor(alone.directions), rtol=0, atol=1e-5)

"""Pareto front and automatic choice, against Optuna's own front and by hand."""

import random
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from bruno_ray.errors import SettingsError, StudyError
from bruno_ray.study.selection import (
    TrialRecord,
    auto_select,
    finalists,
    find_trial,
    load_trials,
    looks_broken,
    pareto_front,
)
from bruno_ray.study.tables import front_lines, front_table, with_selected

OBJECTIVES = ("behaviour_rate", "kl_divergence")


def trial(number: int, rate: float, kl: float, **more: float) -> TrialRecord:
    values = {"behaviour_rate": rate, "kl_divergence": kl, **more}
    edit = {
        "components": {"mlp": {"max_weight": 1.0, "max_weight_position": 3.0}},
        "direction_set": "difference_in_means@0",
        "direction_index": None,
    }
    return TrialRecord(number, "COMPLETE", edit, values, counts={"behaviour_rate": (round(rate * 100), 100)})


@pytest.mark.parametrize("n_objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_front_agrees_with_optuna_with_ties_and_failures(seed, n_objectives):
    generator = random.Random(seed)
    names = [f"metric_{i}" for i in range(n_objectives)]
    study = optuna.create_study(directions=["minimize"] * n_objectives)
    for _ in range(40):
        if generator.random() < 0.1:
            study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"result": {"error": "NaN"}}))
            continue
        values = [generator.randint(0, 5) / 5 for _ in names]
        attrs = {"edit": {}, "result": {"values": dict(zip(names, values)), "counts": {}}}
        study.add_trial(create_trial(values=values, user_attrs=attrs))
    front = pareto_front(load_trials(study), names)
    assert sorted(t.number for t in front) == sorted(t.number for t in study.best_trials)
    points = [tuple(t.values.values()) for t in front]
    assert points == sorted(points)


def test_auto_select_takes_the_lowest_rate_under_the_bound():
    trials = [trial(0, 0.5, 0.01), trial(1, 0.1, 0.09), trial(2, 0.0, 0.2), trial(3, 0.2, 0.02)]
    assert auto_select(trials, max_kl=0.1).trial.number == 1
    assert auto_select(trials, max_kl=0.2).trial.number == 2
    assert auto_select(trials, max_kl=0.01).trial.number == 0  # the bound itself is allowed


def test_broken_answers_count_like_the_behaviour():
    """What a search on an organism once picked: " no , , , ," instead of the refusal, which no marker saw."""
    trials = [trial(0, 0.0, 0.0001, incoherence=0.6), trial(1, 0.2, 0.001, incoherence=0.02), trial(2, 0.9, 0.0)]
    trials = [with_edit(each, each.number) for each in trials]
    choice = auto_select(trials, max_kl=0.1)
    assert choice.trial.number == 1 and choice.runner_up.number == 0
    assert not looks_broken(trials[1]) and "60% of its answers" in looks_broken(trials[0])


def test_evasions_count_where_they_are_measured():
    trials = [trial(0, 0.0, 0.001, evasion_rate=0.7), trial(1, 0.1, 0.01, evasion_rate=0.2, incoherence=0.3)]
    assert auto_select(trials, max_kl=0.1).trial.number == 1
    assert looks_broken(trials[0]) and not looks_broken(trials[1])


def test_one_prompt_does_not_decide_before_the_kl():
    """A difference of 0.00001 once decided before a KL two hundred times as high."""
    trials = [
        trial(0, 0.50, 0.0964, elicited_mismatch=0.50025),
        trial(1, 0.50, 0.0005, elicited_mismatch=0.50026),
        trial(2, 0.51, 0.0004, elicited_mismatch=0.505),
        trial(3, 0.52, 0.0001, elicited_mismatch=0.1),
        trial(4, 0.50, 0.0001, elicited_mismatch=0.52),
    ]
    assert auto_select(trials, 0.1).trial.number == 2
    del trials[4].values["elicited_mismatch"]
    assert auto_select(trials[::-1], 0.1).trial.number == 4, "who has none of it is not asked"


def test_what_few_prompts_cannot_tell_the_search_does():
    """Ten prompts once gave the run away to an edit that the search had seen fail on 7 of 40."""
    searched = [with_edit(trial(0, 0.18, 0.03), 0), with_edit(trial(1, 0.02, 0.06), 1)]
    measured = [replace(each, counts={"behaviour_rate": (3, 10)}, values=each.values | {"behaviour_rate": 0.3})
                for each in searched]  # fmt: skip
    assert auto_select(measured, 0.1).trial.number == 0
    choice = auto_select(measured, 0.1, searched={each.number: each for each in searched})
    assert choice.trial.number == 1 and "1 is within one prompt of the lowest share without" in choice.reason


def test_references_that_no_edit_comes_near_decide_nothing():
    """On a real model all edits missed 0.77 to 0.87 of what the unedited one could be made to say, and those that
    answered as was asked missed most."""
    near = [trial(0, 0.0, 0.01, elicited_mismatch=0.4), trial(1, 0.0, 0.09, elicited_mismatch=0.1)]
    far = [trial(0, 0.0, 0.01, elicited_mismatch=0.87), trial(1, 0.0, 0.09, elicited_mismatch=0.77)]
    assert [auto_select(each, 0.1).trial.number for each in (near, far)] == [1, 0]


def test_the_kl_of_few_prompts_is_taken_with_that_of_the_search():
    """Of two finalists, one had 0.087 over 20 prompts, 0.058 over the search's 40 and 0.042 over 40 others."""
    searched = [
        replace(each, counts={"behaviour_rate": (0, 40)})
        for each in (with_edit(trial(0, 0.0, 0.073), 0), with_edit(trial(1, 0.0, 0.058), 1))
    ]
    measured = [
        replace(each, counts={"behaviour_rate": (0, 20)}, values=each.values | {"kl_divergence": kl})
        for each, kl in zip(searched, (0.069, 0.087))
    ]
    assert auto_select(measured, 0.1).trial.number == 0
    choice = auto_select(measured, 0.1, searched={each.number: each for each in searched})
    assert choice.trial.number == 1
    assert choice.reason.endswith(
        "among them it has the lowest KL (0.06767; next 0.07167, with the prompts of the search)"
    )


def test_the_bound_holds_for_the_kl_of_both():
    """Of 20 prompts seven changed much, so that their mean was 0.139; over the search's 40 it was 0.056."""
    edits = with_edit(trial(0, 0.0, 0.056), 0), with_edit(trial(1, 0.1, 0.05), 1), with_edit(trial(2, 0.0, 0.08), 2)
    searched = [replace(each, counts={"behaviour_rate": (0, 40)}) for each in edits]
    measured = [
        replace(each, counts={"behaviour_rate": (0, 20)}, values=each.values | {"kl_divergence": kl})
        for each, kl in zip(searched, (0.139, 0.05, 0.165))
    ]
    by_number = {each.number: each for each in searched}
    assert auto_select(measured, 0.1).trial.number == 1
    assert auto_select(measured, 0.1, searched=by_number).trial.number == 0  # 0.084; trial 2 has 0.108
    with pytest.raises(StudyError, match=r"the lowest is 0.05 \(trial 1\)"):
        auto_select(measured, 0.01, searched=by_number)


def test_finalists_are_what_the_rule_takes_one_after_the_other():
    trials = [with_edit(trial(i, i / 20, 0.01), i) for i in range(5)]
    trials.append(with_edit(trial(5, 0.0, 0.01), 0))  # the first one's edit once more
    trials.append(with_edit(trial(6, 0.0, 0.2), 6))  # above the bound
    assert [t.number for t in finalists(trials, 0.1, OBJECTIVES, 3)] == [0, 1, 2]
    assert [t.number for t in finalists(trials, 0.1, OBJECTIVES, 9)] == [0, 1, 2, 3, 4]


def with_edit(trial: TrialRecord, strength: float) -> TrialRecord:
    return replace(trial, edit={"components": {"mlp": {"max_weight": strength, "max_weight_position": 3.0}}})


def test_auto_select_says_what_the_lowest_kl_is():
    with pytest.raises(StudyError, match=r"lowest is 0\.3 \(trial 1\)"):
        auto_select([trial(0, 0.0, 0.5), trial(1, 0.4, 0.3)], max_kl=0.1)


def test_auto_select_needs_trials_and_its_metrics():
    with pytest.raises(StudyError, match="no completed trial"):
        auto_select([TrialRecord(0, "FAIL", None, {})], max_kl=0.1)
    with pytest.raises(SettingsError, match="kl_divergence"):
        auto_select([TrialRecord(0, "COMPLETE", None, {"behaviour_rate": 0.0})], max_kl=0.1)


@pytest.mark.parametrize("lost", ["edit", "result"])
def test_a_trial_whose_record_has_lost_a_part_is_on_no_front(lost: str):
    """As a damaged journal has it: told, without what it was told from."""
    study = optuna.create_study(directions=["minimize"] * 2)
    for missing in (None, lost):
        result = {"values": dict.fromkeys(OBJECTIVES, 0.0), "counts": {}}
        attrs = {name: value for name, value in (("edit", {}), ("result", result)) if name != missing}
        study.add_trial(create_trial(values=[0.0, 0.0], user_attrs=attrs))
    trials = load_trials(study)
    assert [t.state for t in trials] == ["COMPLETE", "FAIL"]
    assert "lost from the study's journal" in trials[1].error
    assert [t.number for t in pareto_front(trials, OBJECTIVES)] == [0]


def test_find_trial_refuses_what_has_no_result():
    trials = [trial(0, 0.1, 0.1), TrialRecord(1, "FAIL", None, {})]
    assert find_trial(trials, 0).number == 0
    with pytest.raises(StudyError, match="FAIL"):
        find_trial(trials, 1)
    with pytest.raises(StudyError, match="no trial 7"):
        find_trial(trials, 7)


def test_the_table_shows_counts_as_they_are():
    lines = front_lines([trial(4, 0.03, 0.0123456)], OBJECTIVES)
    assert "3/100" in lines[1] and "0.01235" in lines[1] and "0.03" not in lines[1].split("edit")[0].split("3/100")[0]


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        (
            [trial(0, 0.1, 0.09), trial(1, 0.05, 0.05), trial(2, 0.0, 0.2)],
            "1 of 2 trials with KL <= 0.1 are within one prompt of the fewest without a proper"
            " answer, 5 of 100; it is the only one",
        ),
        (
            [trial(0, 0.0, 0.02), trial(1, 0.01, 0.01), trial(2, 0.5, 0.001)],
            "2 of 3 trials with KL <= 0.1 are within one prompt of the fewest without a proper"
            " answer, 0 of 100; among them it has the lowest KL (0.01; next 0.02)",
        ),
        (
            [
                trial(0, 0.0, 0.01, elicited_mismatch=0.5),
                trial(1, 0.0, 0.03, elicited_mismatch=0.1),
                trial(2, 0.0, 0.09, elicited_mismatch=0.105),
            ],
            "3 of 3 trials with KL <= 0.1 are within one prompt of the fewest without a proper answer, 0 of 100; of"
            " these 2 are within one prompt of the lowest elicited_mismatch, 0.1; among them it has the lowest KL"
            " (0.03; next 0.09)",
        ),
    ],
)
def test_the_choice_says_what_decided(trials, reason):
    assert auto_select(trials, 0.1, OBJECTIVES).reason == reason


def test_the_selected_trial_is_marked_also_where_it_is_not_on_the_front():
    trials = [trial(0, 0.0, 0.01), trial(1, 0.0, 0.05), trial(2, 0.5, 0.005)]
    front = pareto_front(trials, OBJECTIVES)
    assert [t.number for t in with_selected(front, trials, 1)] == [0, 2, 1]
    assert with_selected(front, trials, 2) == with_selected(front, trials, None) == front
    lines = front_lines(with_selected(front, trials, 1), OBJECTIVES, selected=1)
    assert [line[: len("trial")].strip() for line in lines[1:]] == ["0", "2", "* 1"]
    table = front_table(trials, OBJECTIVES, selected=1)
    assert list(table.columns[0].cells) == ["0", "* 1", "2"]


def test_where_doubt_is_measured_it_decides_among_those_within_a_standard_error():
    """The same 0.3 of 100 prompts with a standard error of 4.6: 0.33 is no worse, and surer of what it says."""
    trials = [
        trial(0, 0.0, 0.001, evasion_rate=0.30, doubt=0.6),
        trial(1, 0.0, 0.004, evasion_rate=0.33, doubt=0.2),
        trial(2, 0.0, 0.003, evasion_rate=0.34, doubt=0.25),
        trial(3, 0.0, 0.001, evasion_rate=0.40, doubt=0.1),
    ]
    choice = auto_select(trials, max_kl=0.1)
    assert choice.trial.number == 2, "of those that are as sure within 0.1 the one with the lowest KL"
    assert "within a standard error" in choice.reason and "doubt" in choice.reason
    without = [replace(each, values={k: v for k, v in each.values.items() if k != "doubt"}) for each in trials]
    assert auto_select(without, max_kl=0.1).trial.number == 0


def test_a_trained_edit_is_described_by_its_largest_strengths():
    edit = {
        "components": {"mlp": {"strengths": [0.0, 1.25, 0.5]}},
        "direction_set": "learned-ab",
        "direction_index": None,
    }
    line = front_lines([replace(trial(0, 0.0, 0.0), edit=edit)], OBJECTIVES)[1]
    assert line.endswith("learned-ab trained; mlp 1.25@1")

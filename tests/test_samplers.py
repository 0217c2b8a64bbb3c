"""Every sampler keeps the promise: a study that was killed and resumed is the one that would have been.

And each learns: after its startup it proposes better edits than chance does.
"""

from pathlib import Path

import optuna
import pytest

from bruno_ray.errors import SettingsError
from bruno_ray.optuna_internals import kept_gp_params
from bruno_ray.settings import SearchSettings
from bruno_ray.settings.sources import load
from bruno_ray.study.samplers import FreshSampler, make_sampler
from bruno_ray.study.space import search_space
from tests.support.schedules import SPACE, memory_folder, params
from tests.test_schedule import Driver

__all__ = ["memory_folder"]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

OPTIONS = {"target": 10, "n_startup_trials": 6, "batch_size": 2}


def space() -> dict:
    return search_space(*SPACE)


@pytest.mark.parametrize("sampler", ["gp", "nsga2"])
def test_killed_at_any_write_and_resumed_is_the_same_study(sampler: str, memory_folder: Path):
    driver = Driver(memory_folder / "whole", sampler=sampler, **OPTIONS)
    driver.run()
    expected = params(driver.leave())
    assert len({tuple(each.items()) for each in expected}) == 10
    lines = (memory_folder / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if b'"trial_id":8' in line)
    for cut in range(start, len(lines), 31 if sampler == "nsga2" else 61):
        folder = memory_folder / str(cut)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        again = Driver(folder, sampler=sampler, **OPTIONS)
        again.run()
        assert params(again.leave()) == expected, f"cut at record {cut}"


def test_startup_points_are_those_of_tpe_and_what_follows_is_not(memory_folder: Path):
    found = {}
    for kind in ("tpe", "nsga2"):
        driver = Driver(memory_folder / kind, sampler=kind, **OPTIONS)
        driver.run()
        found[kind] = params(driver.leave())
    assert found["tpe"][:6] == found["nsga2"][:6] and found["tpe"][6:] != found["nsga2"][6:]


@pytest.mark.parametrize("cut", [14, 25])
def test_a_new_process_goes_on_with_cma_es_where_the_old_one_was(cut: int):
    def run(study: optuna.Study, until: int) -> None:
        study.sampler = make_sampler("cmaes", 12, seed=0, space=space())
        while len(study.trials) < until:
            trial = study.ask(space())
            study.tell(trial, trial.params["mlp.max_weight"] ** 2)

    whole, first, second = (optuna.create_study() for _ in range(3))
    run(whole, 40)
    run(first, cut)
    second.add_trials(first.trials)
    run(second, 40)
    assert [trial.params for trial in second.trials] == [trial.params for trial in whole.trials]


@pytest.mark.parametrize(("sampler", "objectives"), [("gp", 2), ("nsga2", 2), ("cmaes", 1)])
def test_it_learns(sampler: str, objectives: int):
    """Of a bowl around attention.max_weight 1.2 and position 2, later proposals are nearer to the bottom."""
    study = optuna.create_study(
        directions=["minimize"] * objectives, sampler=make_sampler(sampler, 12, seed=0, space=space())
    )

    def distance(trial: optuna.trial.FrozenTrial) -> float:
        return abs(trial.params["attention.max_weight"] - 1.2) + abs(trial.params["attention.max_weight_position"] - 2)

    n = 20 if sampler == "gp" else 72
    for _ in range(n):
        trial = study.ask(space())
        study.tell(trial, [distance(study.trials[trial.number])] * objectives)
    first, last = study.trials[:12], study.trials[-6:]
    assert sum(map(distance, last)) / 6 < 0.7 * sum(map(distance, first)) / 12


def test_a_trial_that_was_cut_off_while_a_gaussian_process_sampled_it_gets_the_rest_of_its_own_parameters():
    def study() -> optuna.Study:
        made = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler("gp", 4, seed=0, space=space()))
        for _ in range(6):
            trial = made.ask(space())
            made.tell(trial, [trial.params["mlp.max_weight"], trial.params["attention.max_weight"]])
        return made

    whole, cut = study(), study()
    expected = whole.ask(space()).params
    trial = cut.ask()
    name = next(iter(space()))
    trial.suggest_categorical(name, space()[name].choices)
    assert set(kept_gp_params(cut.trials[6])) == set(expected) - {name}
    cut.sampler = make_sampler("gp", 4, seed=0, space=space())
    again = optuna.Trial(cut, trial._trial_id)
    for name, distribution in space().items():
        again._suggest(name, distribution)
    assert again.params == expected


def test_what_a_sampler_cannot_do_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"cmaes minimises one objective, scoring\.objectives has 2; keep one"):
        load(["--sampler", "cmaes"], environ={})
    with pytest.raises(SettingsError, match=r"gp cannot learn beside trained trials; use tpe with study\.method both"):
        load(["--sampler", "gp", "--method", "both"], environ={})
    one = ["--sampler", "cmaes", "--scoring.objectives", "kl_divergence"]
    assert load(one, environ={}).settings.study.sampler == "cmaes"


def test_words_are_drawn_at_random_for_cma_es_and_by_the_others_not():
    trial = optuna.create_study(directions=["minimize"]).ask()
    frozen = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    frozen.number = 30
    assert trial.number == 0
    words = {"direction_scope", "direction_set"}
    for kind in ("gp", "nsga2", "cmaes"):
        found = FreshSampler(kind, 6, 0, search_space(SearchSettings(), *SPACE[1:])).infer_relative_search_space(
            None, frozen
        )
        assert (words <= set(found)) == (kind != "cmaes")

"""The search space: what can be sampled, and that trial number i is the same in every process."""

import optuna
import pytest

from bruno_ray.errors import SettingsError
from bruno_ray.settings import ComponentRange, SearchSettings
from bruno_ray.study.sampler import NumberedTPESampler
from bruno_ray.study.space import AtBound, at_bounds, bound_lines, edit_from_params, search_space, suggest

SETS = ("difference_in_means@0", "difference_in_means@1")
COMPONENTS = ("attention", "mlp")
LAYERS = 11
SPACE = search_space(SearchSettings(), SETS, LAYERS, COMPONENTS)


def make_study(seed: int = 0, n_startup_trials: int = 5) -> optuna.Study:
    sampler = NumberedTPESampler(n_startup_trials, seed, SPACE)
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def ask(study: optuna.Study):
    trial = study.ask()
    return trial, suggest(trial, SearchSettings(), SETS, LAYERS, COMPONENTS)


def tell(study: optuna.Study, number: int) -> None:
    params = study.trials[number].params
    study.tell(number, [round(1.5 - params["mlp.max_weight"], 1), params["attention.max_weight"] ** 2])


def test_sampled_edits_stay_in_their_ranges_in_layers():
    study = make_study()
    scopes, sets, heights = set(), set(), []
    for _ in range(60):
        trial, edit = ask(study)
        tell(study, trial.number)
        assert 2.0 <= trial.params["direction_index"] <= 10.0  # sampled even when it is ignored
        assert edit.direction_index in (None, trial.params["direction_index"])
        for component in COMPONENTS:
            kernel = edit.components[component]
            assert 0.0 <= kernel.max_weight_position <= 10.0
            assert 0.0 <= kernel.min_weight <= 1.0
            assert 1.0 <= kernel.min_weight_distance <= 15.0
        assert 0.8 <= edit.components["attention"].max_weight <= 1.5
        heights.append(edit.components["mlp"].max_weight)
        scopes.add(edit.direction_index is None)
        sets.add(edit.direction_set)
    assert scopes == {True, False}
    assert sets == set(SETS)
    assert min(heights) < 0 < max(heights) <= 1.5


def test_every_trial_has_the_same_parameters():
    """Multivariate TPE ignores what is not sampled in all trials."""
    study = make_study()
    for _ in range(20):
        trial, _ = ask(study)
        tell(study, trial.number)
    names = {tuple(trial.params) for trial in study.trials}
    assert len(names) == 1
    assert set(names.pop()) == set(search_space(SearchSettings(), SETS, LAYERS, COMPONENTS))


def test_a_choice_with_one_option_is_no_parameter():
    settings = SearchSettings(direction_scopes=("per_layer",))
    space = search_space(settings, SETS[:1], LAYERS, ("mlp",))
    assert "direction_scope" not in space and "direction_set" not in space
    params = {name: distribution.low for name, distribution in space.items()}
    edit = edit_from_params(params, settings, SETS[:1])
    assert edit.direction_set == SETS[0] and edit.direction_index is None
    assert list(edit.components) == ["mlp"]


def test_of_several_kernels_each_component_samples_its_own_and_one_is_no_parameter():
    several = SearchSettings(kernels=("linear", "cosine", "gaussian"))
    space = search_space(several, SETS, LAYERS, COMPONENTS)
    assert set(space) - set(SPACE) == {"attention.shape", "mlp.shape"}
    study = optuna.create_study(directions=["minimize"] * 2, sampler=NumberedTPESampler(16, 0, space))
    edits = [suggest(study.ask(), several, SETS, LAYERS, COMPONENTS) for _ in range(16)]
    pairs = {tuple(kernel.shape for kernel in edit.components.values()) for edit in edits}
    assert {shape for pair in pairs for shape in pair} == set(several.kernels) and len(pairs) > 4
    only = SearchSettings(kernels=("flat",))
    edit = suggest(make_study().ask(), only, SETS, LAYERS, COMPONENTS)
    assert {kernel.shape for kernel in edit.components.values()} == {"flat"}


def test_a_model_of_one_layer_has_a_space():
    space = search_space(SearchSettings(), SETS, 1, COMPONENTS)
    assert space["mlp.min_weight_distance"].single()
    trial = make_study().ask()
    assert suggest(trial, SearchSettings(), SETS, 1, COMPONENTS).components["mlp"].min_weight_distance == 1.0


def test_a_component_without_ranges_is_named():
    with pytest.raises(SettingsError, match="conv"):
        search_space(SearchSettings(), SETS, LAYERS, ("attention", "conv"))


@pytest.mark.parametrize("cut", [3, 9])
def test_a_new_process_samples_what_the_old_one_would_have(cut, tmp_path):
    """Before and after the random start-up trials; Optuna's own sampler repeats its first draws here."""

    def run(study: optuna.Study, until: int) -> None:
        while len(study.trials) < until:
            tell(study, ask(study)[0].number)

    whole = make_study()
    run(whole, 12)

    first = make_study()
    run(first, cut)
    second = make_study()
    second.add_trials(first.trials)
    run(second, 12)

    expected = [trial.params for trial in whole.trials]
    assert [trial.params for trial in second.trials] == expected
    assert len({tuple(params.values()) for params in expected}) == 12


@pytest.mark.parametrize("n_startup_trials", [100, 3])
def test_a_trial_whose_sampling_was_cut_short_gets_the_rest_of_its_own_parameters(n_startup_trials):
    whole = make_study(n_startup_trials=n_startup_trials)
    cut = make_study(n_startup_trials=n_startup_trials)
    for study in (whole, cut):
        for _ in range(6):
            tell(study, ask(study)[0].number)
    expected = ask(whole)[0].params

    trial = cut.ask()
    trial.suggest_categorical("direction_scope", SearchSettings().direction_scopes)
    trial.suggest_float("direction_index", 2.0, 10.0)
    again = optuna.Trial(cut, trial._trial_id)
    cut.sampler = NumberedTPESampler(n_startup_trials, 0, SPACE)
    suggest(again, SearchSettings(), SETS, LAYERS, COMPONENTS)
    assert cut.trials[6].params == expected


def test_startup_trials_leave_no_part_of_the_space_out():
    """Each eighth of every range, and each choice, has its share of 32 trials; drawn one by one, hardly ever."""
    study = make_study(n_startup_trials=32)
    params = [ask(study)[0].params for _ in range(32)]
    space = search_space(SearchSettings(), SETS, LAYERS, COMPONENTS)
    for name, distribution in space.items():
        values = [trial[name] for trial in params]
        if hasattr(distribution, "choices"):
            assert {values.count(choice) for choice in distribution.choices} == {16}
        else:
            eighths = [int(8 * (v - distribution.low) / (distribution.high - distribution.low)) for v in values]
            assert [eighths.count(i) for i in range(8)] == [4] * 8


def test_seeds_differ():
    assert ask(make_study(seed=0))[0].params != ask(make_study(seed=1))[0].params


def at_default(**given: object) -> dict[str, object]:
    """Parameters in the middle of every range, but those that are given (`__` for a dot)."""
    middle = {
        name: distribution.choices[0]
        if hasattr(distribution, "choices")
        else (distribution.low + distribution.high) / 2
        for name, distribution in SPACE.items()
    }
    return middle | {name.replace("__", "."): value for name, value in given.items()}


RANGES = sorted(name for name, distribution in SPACE.items() if not hasattr(distribution, "choices"))


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("side", ["low", "high"])
def test_a_bound_that_a_third_of_the_front_lies_at_is_named_unless_nothing_is_beyond_it(name, side):
    """3 of 10 within 2 % of the range. No layer is below 0 or beyond the last, no strength below 0, no share beyond
    0 and 1, no distance below one layer."""
    distribution = SPACE[name]
    bound, width = getattr(distribution, side), distribution.high - distribution.low
    inside = bound + (0.019 if side == "low" else -0.019) * width
    front = [at_default(**{name: inside})] * 3 + [at_default()] * 7
    found = at_bounds(SearchSettings(), SPACE, front, LAYERS)
    movable = {
        "low": {"attention.max_weight", "direction_index"},
        "high": {f"{component}.{of}" for component in COMPONENTS for of in ("max_weight", "min_weight_distance")},
    }
    expected = [AtBound(name, bound, 3, 10)] if name in movable[side] else []
    assert found == expected
    assert not at_bounds(SearchSettings(), SPACE, [*front[1:], at_default()], LAYERS), "2 of 10 are too few"


def test_a_bound_is_named_as_the_settings_have_it():
    front = [at_default(mlp__min_weight_distance=15.0, attention__max_weight=1.5)] * 2
    lines = bound_lines(SearchSettings(), SPACE, front, LAYERS)
    assert [line.partition(" lie at ")[2] for line in lines] == [
        "the bound 1.5 of search.attention.max_weight: widen it to look beyond",
        "the bound 1.5 of search.mlp.min_weight_distance: widen it to look beyond",
    ]


def test_what_has_no_say_in_an_edit_lies_at_no_bound():
    """The global layer of an edit whose layers each have their own; the kernel of a component of no strength."""
    own = at_default(direction_scope="per_layer", direction_index=2.0)
    nothing = at_default(mlp__max_weight=-0.2, mlp__min_weight_distance=15.0)
    assert not at_bounds(SearchSettings(), SPACE, [own] * 5 + [nothing] * 5, LAYERS)
    mixed = [own] * 5 + [at_default(direction_index=2.0)] * 2
    assert at_bounds(SearchSettings(), SPACE, mixed, LAYERS) == [AtBound("direction_index", 2.0, 2, 2)]


def test_a_range_that_was_narrowed_has_bounds_and_one_of_a_single_value_has_none():
    narrowed = SearchSettings(
        mlp=ComponentRange(max_weight_position=(0.6, 1.0), min_weight=(0.2, 0.2), max_weight=(1.0, 1.0))
    )
    space = search_space(narrowed, SETS, LAYERS, COMPONENTS)
    fixed = {"mlp.max_weight": 1.0, "mlp.min_weight": 0.2}
    front = [at_default(mlp__max_weight_position=6.0) | fixed] * 2
    assert at_bounds(narrowed, space, front, LAYERS) == [AtBound("mlp.max_weight_position", 6.0, 2, 2)]

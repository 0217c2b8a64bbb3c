"""What `--start-from` reads: our runs and saved models, heretic's files as they are published, and what is refused."""

import json
from pathlib import Path

import pytest

from bruno_ray.ablation.edit import AblationParameters, Edit, StrengthTable
from bruno_ray.errors import BrunoError, OutputError, SettingsError, StudyError
from bruno_ray.pipeline.choosing import trials_of
from bruno_ray.pipeline.starting import MOST_OF_A_FRONT, read_starts, starts_of
from bruno_ray.settings import SearchSettings, Settings, StudySettings
from bruno_ray.study.selection import pareto_front
from bruno_ray.study.space import search_space
from bruno_ray.study.starts import Start, fitted, kept_starts, nearest_params
from bruno_ray.study.storage import open_study
from tests.support import finished_run
from tests.support.schedules import opened

CARD = """# This is a decensored version of [Qwen/Qwen3.6-27B](https://huggingface.co/Qwen/Qwen3.6-27B)

## Abliteration parameters

| Parameter | Value |
| :-------- | :---: |
| **direction_index** | 30.38 |
| **attn.out_proj.max_weight** | 1.58 |
| **attn.out_proj.max_weight_position** | 38.93 |
| **attn.out_proj.min_weight** | 1.51 |
| **attn.out_proj.min_weight_distance** | 32.78 |
| **mlp.down_proj.max_weight** | 1.80 |
| **mlp.down_proj.max_weight_position** | 41.28 |
| **mlp.down_proj.min_weight** | 0.54 |
| **mlp.down_proj.min_weight_distance** | 43.66 |
| **attn.o_proj.max_weight** | 1.99 |
| **attn.o_proj.max_weight_position** | 48.06 |
| **attn.o_proj.min_weight** | 1.75 |
| **attn.o_proj.min_weight_distance** | 39.00 |

## Performance

| Metric | This model | Original model |
| :----- | :--------: | :---------------------------: |
| **KL divergence** | 0.0021 | 0 *(by definition)* |
| **Refusals** | 6/100 | 92/100 |
"""
"""A card as it is published, with the three components of a model that has two kinds of attention."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> finished_run.FinishedRun:
    made = finished_run.make(tmp_path_factory.mktemp("runs") / "run")
    settings = made.record.settings
    name = settings.study.name or "run"
    with open_study(name, settings.study.storage, made.run.path, settings.scoring.objectives, {}) as study:
        study.add_trials(made.study.trials)
    return made


def test_a_card_of_heretics_gives_its_kernels_with_the_edge_as_a_share_of_the_peak(tmp_path: Path):
    (tmp_path / "README.md").write_text(CARD)
    for place in (tmp_path, tmp_path / "README.md"):
        (start,) = read_starts(str(place), "full")
        assert start.edit.direction_index == 30.38 and start.edit.norm_mode == "full"
        assert start.edit.components == {
            "attention": AblationParameters(1.99, 48.06, 1.75 / 1.99, 39.0),  # of the attention that all models have
            "mlp": AblationParameters(1.80, 41.28, 0.54 / 1.80, 43.66),
        }
        assert start.edit.strength("attention", 48 + 39) == pytest.approx(1.75, abs=0.01), (
            "at the edge, as heretic has it"
        )
        assert start.origin == f"{tmp_path.name}/README.md"


def test_heretics_reproduce_file_says_how_rows_are_normalised_and_per_layer_is_none(tmp_path: Path):
    kernel = {"max_weight": 1.3, "max_weight_position": 29.4, "min_weight": 0.55, "min_weight_distance": 18.9}
    content = {
        "version": "2",
        "settings": {"model": "owner/name", "row_normalization": "pre"},
        "parameters": {
            "direction_index": None,
            "abliteration_parameters": {"attn.o_proj": kernel, "mlp.down_proj": {**kernel, "max_weight": -0.2}},
        },
        "metrics": {"refusals": 5},
    }
    (tmp_path / "reproduce").mkdir()
    (tmp_path / "reproduce" / "reproduce.json").write_text(json.dumps(content))
    (start,) = read_starts(str(tmp_path), "full")
    assert start.edit.direction_index is None and start.edit.norm_mode == "pre"
    assert start.edit.components["attention"] == AblationParameters(1.3, 29.4, 0.55 / 1.3, 18.9)
    assert start.edit.strength("mlp", 29) == 0.0, "a negative peak is no edit"


def test_a_run_gives_its_front_or_one_trial_and_a_saved_model_its_edit(finished, tmp_path: Path):
    trials = trials_of(finished.run.path, finished.record.settings)
    front = pareto_front(trials, finished.record.settings.scoring.objectives)
    starts = read_starts(str(finished.run.path), "none")
    assert 1 < len(starts) <= MOST_OF_A_FRONT
    numbers = [start.origin.removeprefix("run:") for start in starts]
    assert len(set(numbers)) == len(starts) and set(numbers) <= {str(trial.number) for trial in front}
    assert (numbers[0], numbers[-1]) == (str(front[0].number), str(front[-1].number)), "both ends"
    (one,) = read_starts(f"{finished.run.path}:{front[-1].number}", "none")
    assert one.edit.to_dict() == front[-1].edit and one.n_layers == finished.record.model["n_layers"]
    (tmp_path / "bruno.json").write_text(json.dumps({"edit": front[0].edit, "run": "run"}))
    (saved,) = read_starts(str(tmp_path), "none")
    assert saved.edit == starts[0].edit


def test_an_edit_of_a_deeper_model_keeps_its_share_of_the_depth_and_takes_a_direction_set_that_there_is():
    edit = Edit(
        {"mlp": AblationParameters(1.0, 40.0, 0.5, 20.0), "experts": AblationParameters(1.0, 1.0, 1.0, 1.0)},
        "a",
        30.0,
        "full",
    )
    found = fitted(Start(edit, "x", n_layers=41), ("b", "c"), 21, ("attention", "mlp")).edit
    assert found == Edit({"mlp": AblationParameters(1.0, 20.0, 0.5, 10.0)}, "b", 15.0, "full")
    point = nearest_params(found, search_space(SearchSettings(), ("b", "c"), 21, ("attention", "mlp")))
    assert (point["mlp.max_weight_position"], point["direction_index"], point["direction_set"]) == (20.0, 15.0, "b")


def test_a_study_that_has_begun_reads_no_starts_again(finished, tmp_path: Path):
    study = finished.record.settings.study.model_copy(update={"start_from": ("/gone",), "storage": None})
    settings = finished.record.settings.model_copy(update={"study": study})
    with pytest.raises(BrunoError, match="gone"):
        starts_of(settings, tmp_path / "new")
    with opened(tmp_path) as begun:
        kept_starts(begun, [])
    named = settings.model_copy(update={"study": study.model_copy(update={"name": "test"})})
    assert starts_of(named, tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", "{"),
        ("x.json", "[]"),
        ("x.json", '{"parameters": {}}'),
        ("x.json", '{"edit": {"components": {"mlp": {"max_weight": 1}}}}'),
        ("x.md", "# A model"),
        ("x.md", CARD.replace("1.99", "strong")),
        ("x.md", CARD.replace("attn.", "conv.").replace("mlp.", "conv2.")),
    ],
)
def test_a_file_without_an_edit_is_one_line(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(
        SettingsError, match=r"study\.start_from: there is no edit in .*x\.(json|md): give a run"
    ) as raised:
        read_starts(str(tmp_path / name), "full")
    assert "\n" not in str(raised.value)


def test_nothing_to_start_from_and_a_trained_edit_are_refused_before_anything_is_loaded(tmp_path: Path):
    with pytest.raises(OutputError, match=r"is not a run and has no bruno\.json"):
        read_starts(str(tmp_path), "full")
    edit = Edit({"mlp": StrengthTable((0.5, 1.0))}, "learned:1", None, "none")
    (tmp_path / "bruno.json").write_text(json.dumps({"edit": edit.to_dict()}))
    settings = Settings(study=StudySettings(name="new", start_from=(str(tmp_path),)))
    with pytest.raises(StudyError, match=r"bruno\.json was trained"):
        starts_of(settings, tmp_path / "new")

"""Which models are served, under which names; what is broken is said and does not stop the rest."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from bruno_ray.ablation.edit import AblationParameters, Edit, StrengthTable
from bruno_ray.errors import OutputError, SettingsError
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, ScoresRecord, SelectedRecord
from bruno_ray.settings import ModelSettings, PromptSettings, Settings, StudySettings
from bruno_ray.study.storage import open_storage
from serve.app import application, model_of
from serve.arguments import add_arguments, serve_args
from serve.catalog.catalog import Catalog, discovered
from serve.catalog.folders import problem_of
from serve.catalog.runs import ServedRun
from serve.errors import UnknownModel
from serve.settings import ServeArgs
from tests.support import tiny_models

VALUES = [(0.9, 0.001), (0.1, 0.02), (0.5, 0.5), (0.0, 0.3)]  # trial 2 is beaten by trial 1


def edit_of(number: int) -> Edit:
    return Edit({"mlp": AblationParameters(1.0 + number / 10, 1.0, 0.5, 2.0)}, "difference_in_means@0", None, "none")


def add_trial(path: Path, number: int, edit: Edit | None = None) -> None:
    study = optuna.load_study(study_name=path.name, storage=open_storage(None, path))
    trial = study.ask()
    rate, kl = VALUES[number]
    trial.set_user_attr("edit", (edit or edit_of(number)).to_dict())
    values = {"behaviour_rate": rate, "kl_divergence": kl}
    trial.set_user_attr("result", {"values": values, "counts": {"behaviour_rate": [round(rate * 10), 10]}})
    study.tell(trial, (rate, kl))


def make_run(
    path: Path,
    model: Path | ModelSettings,
    n_trials: int = 4,
    selected: int | None = 1,
    d_model: int = tiny_models.HIDDEN,
    **prompts,
) -> RunDirectory:
    settings = Settings(
        model=model if isinstance(model, ModelSettings) else ModelSettings(id=str(model)),
        prompts=PromptSettings(**prompts),
        study=StudySettings(name=path.name),
    )
    chosen = None
    if selected is not None:
        scores = ScoresRecord(values={"behaviour_rate": 0.2, "kl_divergence": 0.03})
        chosen = SelectedRecord(number=selected, edit=edit_of(selected).to_dict(), validation=scores)
    run = RunDirectory.create(path, RunRecord(settings=settings, response_prefix="Well,", selected=chosen))
    run.save_directions({"difference_in_means@0": torch.randn(5, 1, d_model)})
    optuna.create_study(study_name=path.name, storage=open_storage(None, path), directions=["minimize"] * 2)
    for number in range(n_trials):
        add_trial(path, number)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("bases") / "tiny-base")


@pytest.fixture
def run(tmp_path, base) -> RunDirectory:
    return make_run(tmp_path / "runs" / "mine", base, system_prompt="Be brief.")


def ids(catalog: Catalog) -> list[str]:
    return [entry.id for entry in catalog.entries]


def discover(run_or_runs, *models, folder: Path = Path()) -> Catalog:
    runs = run_or_runs if isinstance(run_or_runs, list) else [run_or_runs]
    return Catalog.discover([run.path if isinstance(run, RunDirectory) else run for run in runs], models, folder)


def test_base_front_and_selected_trial_share_one_engine(run, base):
    catalog = discover(run)
    assert ids(catalog) == ["tiny-base", "tiny-base:trial-3", "tiny-base:trial-1", "tiny-base:trial-0", "mine"]
    assert {entry.base for entry in catalog.entries} == set(catalog.engines) == {"tiny-base"}
    assert catalog.engines["tiny-base"].settings == ModelSettings(id=str(base))
    assert not catalog.problems
    selected, trial = catalog.resolve("mine"), catalog.resolve("tiny-base:trial-1")
    assert (selected.kind, trial.kind, catalog.resolve("tiny-base").edit) == ("run", "trial", None)
    assert selected.edit == trial.edit == edit_of(1).to_dict()
    assert selected.edit_key == trial.edit_key
    assert trial.metrics == {"behaviour_rate": 0.1, "kl_divergence": 0.02}
    assert selected.metrics["behaviour_rate"] == 0.2


def test_prompts_are_rendered_as_the_run_did(run):
    for entry in discover(run).entries:
        assert (entry.system_prompt, entry.response_prefix) == ("Be brief.", "Well,")


def test_a_trial_off_the_front_can_be_asked_for_and_others_do_not_exist(run):
    catalog = discover(run)
    assert catalog.resolve("tiny-base:trial-2").edit == catalog.resolve("mine:trial-2").edit == edit_of(2).to_dict()
    for unknown in ("tiny-base:trial-4", "other:trial-1", "tiny-base:trial-", "Mine", ""):
        with pytest.raises(UnknownModel) as raised:
            catalog.resolve(unknown)
        assert raised.value.status == 404


def test_an_edit_can_be_asked_for_weaker_and_stronger(run):
    """By any name of an edit; every layer's strength is multiplied, and nothing else is changed."""
    catalog = discover(run)
    for name, number in (("tiny-base:trial-2", 2), ("mine:trial-3", 3), ("mine", 1)):
        plain, seen = catalog.resolve(name), set()
        for text, scale in (("0.6", 0.6), (".25", 0.25), ("1", 1.0), ("2", 2.0), ("0", 0.0)):
            scaled = catalog.resolve(f"{name}*{text}")
            found, full = Edit.from_dict(scaled.edit), edit_of(number)
            for layer in range(4):
                assert found.strength("mlp", layer) == pytest.approx(scale * full.strength("mlp", layer))
            assert (found.direction_set, found.norm_mode) == (full.direction_set, full.norm_mode)
            assert (scaled.base, scaled.trial, scaled.metrics) == (plain.base, number, {})
            assert scaled.id == f"{plain.id}*{scale:g}" and scaled.description.endswith(f"times {scale:g}")
            seen.add(scaled.edit_key)
        assert len(seen) == 5 and plain.edit_key not in seen
    assert catalog.resolve("mine*0.6").edit_key == catalog.resolve("mine:trial-1*0.60").edit_key
    assert [entry for entry in ids(catalog) if "*" in entry] == []
    trained = Edit({"mlp": StrengthTable((0.5, 1.0))}, "difference_in_means@0", None, "full")
    assert trained.scaled(0.5).components["mlp"] == StrengthTable((0.25, 0.5))


@pytest.mark.parametrize(
    ("model_id", "reason"),
    [
        ("tiny-base*0.5", "no edit"),
        ("mine*2.01", "0 to 2 in steps of 0.01"),
        ("mine*0.333", "0 to 2 in steps of 0.01"),
        ("mine*0.5*0.5", "does not exist"),
        ("mine*-1", "does not exist"),
        ("mine*", "does not exist"),
        ("mine*x", "does not exist"),
        ("other*0.5", "does not exist"),
    ],
)
def test_what_cannot_be_scaled_is_a_404_that_says_why(run, model_id, reason):
    with pytest.raises(UnknownModel, match=reason) as raised:
        discover(run).resolve(model_id)
    assert raised.value.status == 404


def test_a_run_that_selected_nothing_is_left_out(tmp_path, base):
    run = make_run(tmp_path / "open", base, selected=None)
    assert "open" not in ids(discover(run))


def test_trials_of_a_study_that_goes_on_appear(tmp_path, base, monkeypatch):
    monkeypatch.setattr("serve.catalog.catalog.REFRESH_SECONDS", 0.0)
    run = make_run(tmp_path / "going-on", base, n_trials=1, selected=None)
    catalog = discover(run)
    assert ids(catalog) == ["tiny-base", "tiny-base:trial-0"]
    add_trial(run.path, 1)
    catalog.refresh()
    assert "tiny-base:trial-1" in ids(catalog)
    shutil.move(run.path, tmp_path / "gone")  # out of reach: served as it was
    catalog.refresh()
    assert "tiny-base:trial-1" in ids(catalog)


def test_two_runs_on_one_base_share_its_engine_and_name_their_trials(tmp_path, base, run):
    other = make_run(tmp_path / "runs" / "other", base, n_trials=2, selected=None)
    catalog = discover([run, other])
    assert list(catalog.engines) == ["tiny-base"]
    assert {"mine:trial-1", "other:trial-1", "mine"} <= set(ids(catalog))
    assert catalog.resolve("mine:trial-1").edit_key != catalog.resolve("other:trial-1").edit_key
    with pytest.raises(UnknownModel, match="mine:trial-1, other:trial-1"):
        catalog.resolve("tiny-base:trial-1")


def test_runs_and_bases_of_the_same_name_stay_apart(tmp_path, base, run):
    elsewhere = tiny_models.write(tmp_path / "elsewhere" / "tiny-base")
    twin = make_run(tmp_path / "more" / "mine", elsewhere)
    catalog = discover([run, twin])
    assert list(catalog.engines) == ["tiny-base", "tiny-base-2"]
    assert {"mine", "more/mine"} <= set(ids(catalog))
    assert catalog.resolve("tiny-base-2:trial-1").run == twin.path


def test_runs_are_found_by_name(run):
    assert "mine" in ids(discover("mine", folder=run.path.parent))


def test_saved_models_have_engines_of_their_own_and_are_found_in_folders(tmp_path, base, run):
    shutil.copytree(base, run.model_folder)
    alone = shutil.copytree(base, tmp_path / "saved" / "alone")
    catalog = discover(run, run.path.parent, alone)
    assert set(catalog.engines) == {"tiny-base", "mine/model", "alone"}
    inside, outside = catalog.resolve("mine/model"), catalog.resolve("alone")
    assert (inside.kind, inside.base, inside.edit) == ("saved", "mine/model", None)
    assert (inside.system_prompt, inside.response_prefix, inside.trial) == ("Be brief.", "Well,", 1)
    assert (outside.system_prompt, outside.response_prefix) == (None, "")


def test_a_hub_id_is_served_as_a_base():
    catalog = discover([], "Qwen/Qwen3-0.6B")
    assert ids(catalog) == ["Qwen3-0.6B"]
    assert catalog.engines["Qwen3-0.6B"].settings.id == "Qwen/Qwen3-0.6B"


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "config is no JSON":
            (folder / "config.json").write_text("{")
        case "no weights":
            weights.unlink()
        case "weights cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "a shard is missing":
            weights.rename(folder / "model-00001-of-00002.safetensors")
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no chat template":
            for file in folder.glob("chat_template*"):
                file.unlink()
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings.pop("chat_template", None)
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))


REASONS = {
    "no config": "config.json is missing",
    "config is no JSON": "config.json cannot be read",
    "no weights": "the weights are missing",
    "weights cut off": "model.safetensors is damaged",
    "a shard is missing": "1 of 2 files of weights are missing",
    "no tokenizer": "the tokenizer is missing",
    "no chat template": "no chat template",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_broken_folder_is_listed_with_its_reason_and_others_go_on(tmp_path, base, how):
    broken = shutil.copytree(base, tmp_path / "models" / "broken")
    shutil.copytree(base, tmp_path / "models" / "sound")
    assert problem_of(broken) is None
    damage(broken, how)
    catalog = discover([], tmp_path / "models")
    assert ids(catalog) == ["sound"]
    (problem,) = catalog.problems
    assert problem.id == "broken"
    assert REASONS[how] in problem.reason
    with pytest.raises(UnknownModel, match=REASONS[how].replace(".", r"\.")):
        catalog.resolve("broken")


def test_a_trained_trial_is_served_with_directions_of_its_own(run: RunDirectory) -> None:
    name, directions = "learned-0123456789ab", np.ones((tiny_models.LAYERS + 1, 1, tiny_models.HIDDEN), np.float32)
    trained = Edit({"mlp": StrengthTable((0.5,) * tiny_models.LAYERS)}, name, None, "none")
    run.save_learned(name, directions)
    add_trial(run.path, 0, trained)
    served = ServedRun.open(run)
    assert (served.directions(name) == directions).all()
    assert Edit.from_dict(served.trials[-1].edit) == trained
    run.file_of_directions(name).unlink()
    with pytest.raises(OutputError, match=r"learned-0123456789ab\.safetensors"):
        ServedRun.open(run)


def damage_run(run: RunDirectory, how: str) -> None:
    match how:
        case "no study":
            run.journal_file.unlink()
        case "study is damaged":
            run.journal_file.write_text("nonsense\n")
        case "run.json is damaged":
            run.run_file.write_text("{")
        case "no directions":
            run.directions_file.unlink()
        case "directions are damaged":
            run.directions_file.write_bytes(b"nonsense")
        case "base is gone":
            record = run.read()
            model = record.settings.model.model_copy(update={"id": "/nowhere/at-all"})
            run.update(settings=record.settings.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    "how",
    ["no study", "study is damaged", "run.json is damaged", "no directions", "directions are damaged", "base is gone"],
)
def test_a_broken_run_is_listed_with_its_reason_and_others_go_on(tmp_path, base, run, how):
    broken = make_run(tmp_path / "runs" / "broken", base)
    damage_run(broken, how)
    catalog = discover([broken.path, run])
    assert "mine" in ids(catalog)
    (problem,) = catalog.problems
    assert problem.id == "broken"
    assert "\n" not in problem.reason and problem.reason


def test_a_run_that_does_not_exist_is_a_problem_too(tmp_path, run):
    assert [problem.id for problem in discover(["nothing", run], folder=tmp_path).problems] == ["nothing"]


def test_nothing_to_serve_is_an_error_that_says_why(tmp_path):
    with pytest.raises(SettingsError, match="nothing to serve"):
        discovered(ServeArgs())
    with pytest.raises(SettingsError, match="no folder"):
        discovered(ServeArgs(models=(str(tmp_path / "nothing"),)))


def test_a_required_key_must_be_known(run):
    args = ServeArgs(runs=(str(run.path),))
    with pytest.raises(SettingsError, match="BRUNO_API_KEY"):
        application(args, discovered(args), ())


def test_arguments_of_serve_run_are_text():
    args = ServeArgs.model_validate({"runs": "a,b", "models": "c", "require_key": "false", "max_replicas": "3"})
    assert (args.runs, args.models, args.require_key, args.max_replicas) == (("a", "b"), ("c",), False, 3)


def test_the_commented_configuration_has_every_setting_at_its_default():
    import yaml

    application = yaml.safe_load((Path(__file__).parents[2] / "serve" / "config.yaml").read_text())["applications"][0]
    assert ServeArgs.model_validate(application["args"]) == ServeArgs()
    assert set(application["args"]) == set(ServeArgs.model_fields)


def test_the_lean_forward_pass_is_off_where_the_run_or_the_server_says_so(tmp_path, base):
    off = make_run(tmp_path / "off", ModelSettings(id=str(base), lean_forward="off"))
    on = make_run(tmp_path / "on", base)
    for arguments, expected in (([], {"off", "auto"}), (["--lean-forward", "off"], {"off"})):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = serve_args(parser.parse_args([str(off.path), str(on.path), *arguments]), key_known=False)
        engines = discovered(args).engines.values()
        assert {model_of(args, engine).lean_forward for engine in engines} == expected


def test_catalog_needs_neither_torch_nor_ray():
    modules = "serve.catalog.catalog, serve.api.requests, serve.api.auth"
    code = f"import sys, {modules}; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

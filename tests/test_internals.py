"""What is private in Ray, Optuna and transformers does what this project needs of it, or an upgrade breaks it here."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.trial import TrialState
from ray import serve, tune
from transformers import AutoConfig

from bruno_ray import optuna_internals, ray_internals, transformers_internals
from bruno_ray.model.stored_names import empty_model
from bruno_ray.study.storage import RunJournal
from cluster.jobs.shell import free_port
from tests.support import tiny_models

pytest_plugins = ["tests.support.local_ray"]

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}

# ----- Optuna -----


def test_a_study_s_storage_is_where_its_trials_go() -> None:
    study = optuna.create_study(storage=InMemoryStorage())
    storage = optuna_internals.storage_of(study)
    study.ask()
    assert isinstance(storage, BaseStorage)
    assert storage.get_n_trials(storage.get_study_id_from_name(study.study_name)) == 1


def test_the_backend_of_a_journal_is_the_one_it_was_made_with(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path / "study.journal")
    study = optuna.create_study(storage=JournalStorage(journal))
    assert optuna_internals.journal_backend(optuna_internals.storage_of(study)) is journal
    assert optuna_internals.journal_backend(InMemoryStorage()) is None
    database = optuna.create_study(storage=RDBStorage(f"sqlite:///{tmp_path}/study.db"))
    assert not isinstance(optuna_internals.journal_backend(optuna_internals.storage_of(database)), RunJournal)


def test_an_unfinished_trial_gets_an_attribute_by_its_number() -> None:
    study = optuna.create_study()
    study.ask()
    study.ask()
    optuna_internals.set_trial_attribute(study, 1, "result", {"values": {"a": 1.0}})
    assert [trial.user_attrs for trial in study.get_trials()] == [{}, {"result": {"values": {"a": 1.0}}}]


def test_an_unfinished_trial_goes_on_under_its_own_number() -> None:
    study = optuna.create_study()
    study.ask()
    first = study.ask()
    first.suggest_float("x", 0.0, 1.0)
    again = optuna_internals.unfinished_trial(study, study.get_trials()[1])
    again.suggest_float("y", 0.0, 1.0)
    assert (again.number, set(study.get_trials()[1].params)) == (1, {"x", "y"})
    study.tell(again.number, 0.5)
    assert study.get_trials()[1].state == TrialState.COMPLETE


@pytest.mark.parametrize("n_startup_trials", [100, 1])
def test_a_seeded_sampler_draws_the_same_again(n_startup_trials: int) -> None:
    """While it draws at random, and while it samples from its model."""

    def drawn(key: list[int]) -> list[float]:
        sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=n_startup_trials)
        study = optuna.create_study(sampler=sampler)
        for value in range(4):
            distribution = optuna.distributions.FloatDistribution(0.0, 1.0)
            study.add_trial(
                optuna.create_trial(params={"x": value / 4}, distributions={"x": distribution}, value=value)
            )
        optuna_internals.seed_sampler(sampler, key)
        trial = study.ask()
        return [trial.suggest_float("x", 0.0, 1.0), trial.suggest_float("y", 0.0, 1.0)]

    assert drawn([1, 2]) == drawn([1, 2]) != drawn([1, 3])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_gaussian_process_notes_the_parameters_it_has_sampled_with_their_trial() -> None:
    study = optuna.create_study()
    space: dict[str, Any] = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in "xy"}
    study.tell(study.ask(space), 0.5)
    trial = study.ask()
    assert optuna_internals.kept_gp_params(study.get_trials()[trial.number]) == {}
    sampler = optuna.samplers.GPSampler(seed=0, n_startup_trials=1)
    sampled = sampler.sample_relative(study, study.get_trials()[trial.number], space)
    assert set(sampled) == {"x", "y"} and optuna_internals.kept_gp_params(study.get_trials()[trial.number]) == sampled


def test_the_id_of_a_stored_study_is_the_one_storages_find_it_by() -> None:
    storage = InMemoryStorage()
    optuna.create_study(storage=storage, study_name="first")
    optuna.create_study(storage=storage, study_name="second")
    ids = {study.study_name: optuna_internals.study_id_of(study) for study in storage.get_all_studies()}
    assert ids == {name: storage.get_study_id_from_name(name) for name in ("first", "second")}


# ----- Ray -----


PRINTS_TWO_LINES = """
from bruno_ray.ray_internals import drop_worker_output
drop_worker_output("swallow this")
from ray._private.worker import print_to_stdstream
for line in ("swallow this line", "keep this line"):
    data = {"ip": "1", "pid": 7, "job": "01", "is_err": False, "lines": [line], "actor_name": None, "task_name": None}
    print_to_stdstream(data, ignore_prefix=False)
"""


def test_lines_that_match_are_not_printed_by_the_driver() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS_TWO_LINES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "keep this line" in done.stdout and "swallow" not in done.stdout


UNDER_UV_RUN = """
from ray._private.worker import _maybe_modify_runtime_env
from bruno_ray.ray_internals import forget_uv_run
print("working_dir" in _maybe_modify_runtime_env({}, False))
forget_uv_run()
print(_maybe_modify_runtime_env({}, False))
"""


def test_a_cluster_started_under_uv_run_packs_no_folder(tmp_path: Path) -> None:
    """Ray tells `uv run` by the command line of the parent."""
    parent = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {UNDER_UV_RUN!r}], check=True)"
    (tmp_path / "run").write_text(parent)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["uv", "run"], executable=sys.executable, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "{}"], done.stderr


@pytest.fixture
def no_handler() -> Iterator[None]:
    """As in a process that never ran a tuner; one that did keeps Tune's handler."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_no_signal_is_raised_when_no_tuner_runs(no_handler: None) -> None:
    ray_internals.stop_tuner()  # the signal would end this process


class StopsTheTuner(tune.Callback):
    def on_trial_result(self, iteration: int, trials: list, trial: object, result: dict, **info: object) -> None:
        ray_internals.stop_tuner()


def never_done(config: dict) -> None:
    while True:
        tune.report({"value": 1})
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tuner_that_is_stopped_returns(local_ray: None, tmp_path: Path) -> None:
    run_config = tune.RunConfig(storage_path=str(tmp_path), verbose=0, callbacks=[StopsTheTuner()])
    tune.Tuner(never_done, run_config=run_config).fit()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_serve_says_where_its_proxy_listens(local_ray: None) -> None:
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    try:
        first = ray_internals.serve_address()
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})  # which changes nothing
        assert ray_internals.serve_address() == first
        with socket.create_connection(first, timeout=60):
            pass
    finally:
        serve.shutdown()


def test_the_autoscaler_s_command_runner_takes_what_ours_gives_it() -> None:
    from cluster.setup.command_runner import VastCommandRunner

    runner = ray_internals.ssh_command_runner()
    assert issubclass(VastCommandRunner, runner)
    for name in ("run", "_get_node_ip", "remote_shell_command_str", "run_rsync_up", "run_rsync_down"):
        assert callable(getattr(runner, name))


# ----- transformers -----


def test_fp8_blocks_are_those_that_were_written() -> None:
    """160 rows with 2 scales are 128 and 32, not 80 and 80; 576 with 5 are read at all."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    transformers_internals.mend_ragged_fp8()
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128]))
    for rows in (160, 576, 256):
        weight = torch.ones(rows, 128).to(torch.float8_e4m3fn)
        scales = torch.arange(1.0, -(-rows // 128) + 1)[:, None]
        read = Fp8Dequantize(quantizer)._dequantize_one(weight, scales, output_dtype=torch.float32)
        assert torch.equal(read[:, 0], torch.arange(rows).div(128, rounding_mode="floor") + 1.0)


def test_stored_tensors_are_told_under_the_names_of_parameters() -> None:
    model = empty_model(tiny_models.FAMILIES["mixtral"]())
    block = "model.layers.0."
    experts = [f"{block}block_sparse_moe.experts.{i}.w2.weight" for i in (10, 2)]
    names = [f"{block}self_attn.o_proj.weight", "model.layers.9.self_attn.o_proj.weight", *experts]
    found = {one.name: one for one in transformers_internals.loaded_names(model, names)}
    assert list(found)[:2] == experts[::-1]  # stacked in the order of their numbers
    assert {(one.parameters, one.way) for one in list(found.values())[:2]} == {
        ((f"{block}mlp.experts.down_proj",), "stacked")
    }
    assert (found[names[0]].parameters, found[names[0]].way) == ((names[0],), "as it is")
    assert found[names[1]].parameters == ()


def test_what_a_checkpoint_may_lack_and_may_have_besides() -> None:
    tied = empty_model(AutoConfig.for_model("llama", **TINY, tie_word_embeddings=True))
    names = ["lm_head.weight", "model.norm.weight"]
    assert transformers_internals.not_missed(tied, names) == ["lm_head.weight"]
    untied = empty_model(AutoConfig.for_model("llama", **TINY, tie_word_embeddings=False))
    assert transformers_internals.not_missed(untied, names) == []
    drafting = empty_model(tiny_models.FAMILIES["qwen3_5_text"]())
    assert transformers_internals.not_unexpected(drafting, ["mtp.fc.weight", "odd"]) == ["mtp.fc.weight"]
    assert transformers_internals.not_unexpected(untied, ["mtp.fc.weight"]) == []

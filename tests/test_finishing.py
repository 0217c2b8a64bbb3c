"""What follows the search: when something is wrong with the trial that was picked, and when all is done already."""

import logging
from pathlib import Path

import optuna
import pytest
import torch

from bruno_ray.errors import TrialError
from bruno_ray.pipeline import choosing, commands
from bruno_ray.pipeline.finishing import folder_to_fill, score_selected, select
from bruno_ray.pipeline.run import is_finished
from bruno_ray.prompts.sets import Prompt, PromptParts, Prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.workers.exchanged import TrialOutcome
from tests.support.finished_run import make, scores

SIDE = PromptParts((Prompt("a"),), (Prompt("b"),), (Prompt("c"),))
PROMPTS = Prompts(SIDE, SIDE, "fingerprint")


class BrokenOnTest:
    """A pool whose workers find no number in the selected trial's logits."""

    def set_context(self, context):
        pass

    def call(self, method, *args, with_context=False):
        if method == "baseline":
            return scores({"behaviour_rate": 1.0, "kl_divergence": 0.0})
        assert method == "evaluate"
        return [TrialOutcome(scores=None, error="logits are not numbers")]


def test_a_selected_trial_without_test_scores_is_an_error_that_says_what_to_do(tmp_path):
    run = make(tmp_path).run
    run.save_directions({"difference_in_means@0": torch.zeros(13, 1, 4)})
    number = run.read().selected.number
    with pytest.raises(TrialError, match=rf"trial {number} .*not numbers.*--trial N"):
        score_selected(run, run.read().selected, PROMPTS, BrokenOnTest())


def saved_run(folder: Path) -> RunDirectory:
    """One whose selected trial lies in its model folder."""
    run = make(folder).run
    run.model_folder.mkdir()
    (run.model_folder / "README.md").write_text("a card")
    run.update(selected=run.read().selected.model_copy(update={"saved_path": str(run.model_folder)}))
    return run


def test_the_same_trial_picked_again_is_not_saved_again(tmp_path: Path) -> None:
    run = saved_run(tmp_path)
    before = run.read()
    again = before.selected.model_copy(update={"saved": None, "saved_path": None, "reason": "picked again"})
    select(run, again)
    after = run.read()
    assert after.selected == before.selected.model_copy(update={"reason": "picked again"})
    assert after.extra == before.extra
    assert folder_to_fill(run, again.number) is None
    other = again.model_copy(update={"number": again.number + 1})
    assert folder_to_fill(run, other.number) == run.path / f"model-{other.number}"
    select(run, other)
    assert run.read().selected == other and run.read().extra == {}
    assert folder_to_fill(run, other.number) == run.path / f"model-{other.number}", "it has not been measured"


def test_a_finished_run_is_left_alone_unless_something_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(commands, "report", written.append)
    run = saved_run(tmp_path)
    record = run.read()
    by_rule = record.settings.model_copy(
        update={"selection": record.settings.selection.model_copy(update={"auto": True})}
    )
    run.write(record.model_copy(update={"settings": by_rule}))
    n_trials = by_rule.study.n_trials
    with caplog.at_level(logging.INFO):
        assert is_finished(run, by_rule, n_trials)
    assert written == [run.path] and f"trial {record.selected.number} is saved in {run.model_folder}" in caplog.text
    bound = by_rule.selection.model_copy(update={"max_kl": 0.5})
    assert not is_finished(run, by_rule, n_trials - 1), "a trial is missing"
    assert not is_finished(run, record.settings, n_trials), "somebody is to be asked"
    assert not is_finished(run, by_rule.model_copy(update={"selection": bound}), n_trials), "another pick is possible"
    (run.model_folder / "README.md").unlink()
    assert not is_finished(run, by_rule, n_trials), "the model is gone"
    assert written == [run.path]


def test_a_study_that_lacks_trials_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(tmp_path)
    monkeypatch.setattr(choosing, "study_of", lambda path, settings: made.study)
    choosing.trials_of(made.run.path, made.record.settings)
    assert not caplog.text
    monkeypatch.setattr(choosing, "study_of", lambda path, settings: optuna.create_study(directions=["minimize"] * 2))
    choosing.trials_of(made.run.path, made.record.settings)
    assert "holds 0 of its 40 trials" in caplog.text and str(made.run.journal_file) in caplog.text

"""The run directory: written whole or not at all, read back checked."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bruno_ray.errors import OutputError, SettingsError
from bruno_ray.files import (
    atomic_directory,
    atomic_file,
    cache_folder,
    expanded,
    output_errors,
    require_free_space,
    size_text,
    write_json,
)
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.lookup import find_trial
from bruno_ray.runs.records import RunRecord, ScoresRecord, installed_versions
from bruno_ray.settings import ModelSettings, Settings


@pytest.fixture
def record() -> RunRecord:
    return RunRecord(settings=Settings(model=ModelSettings(id="some/model")), versions=installed_versions())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 kB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield place
    subprocess.run(["umount", place], check=True)


def visible_and_hidden(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_run_record_survives_the_disk(tmp_path, record):
    run = RunDirectory.create(tmp_path / "a", record)
    assert RunDirectory.open(tmp_path / "a").read() == record
    assert {"python", "torch", "transformers", "ray", "optuna", "bruno-ray"} <= set(run.read().versions)
    assert visible_and_hidden(run.path) == [".run.json.lock", "run.json"]


def test_update_merges_mappings_and_replaces_the_rest(tmp_path, record):
    run = RunDirectory.create(tmp_path / "a", record)
    run.update(timings={"residuals": 1.5})
    run.update(timings={"study": 2.0}, response_prefix="x")
    after = run.read()
    assert after.timings == {"residuals": 1.5, "study": 2.0}
    assert after.response_prefix == "x"
    with pytest.raises(ValueError, match="no_such_field"):
        run.update(no_such_field=1)
    assert run.read() == after


def test_scores_carry_wilson_intervals():
    values, counts = {"behaviour_rate": 0.03, "kl_divergence": 0.02}, {"behaviour_rate": (3, 100)}
    scores = ScoresRecord.of(SimpleNamespace(values=values, counts=counts))
    low, high = scores.intervals["behaviour_rate"]
    # Wilson score interval of 3/100 at 95 %, by hand: (0.0494 -+ 0.0379) / 1.0384
    assert (low, high) == (pytest.approx(0.01025, abs=1e-4), pytest.approx(0.08452, abs=1e-4))
    assert "kl_divergence" not in scores.intervals


def test_existing_run_is_not_overwritten_but_can_be_continued(tmp_path, record):
    RunDirectory.create(tmp_path / "a", record).update(response_prefix="kept")
    with pytest.raises(OutputError, match="resume"):
        RunDirectory.create(tmp_path / "a", record)
    assert RunDirectory.create(tmp_path / "a", record, resume=True).read().response_prefix == "kept"


def test_folder_with_other_things_in_it_is_left_alone(tmp_path, record):
    (tmp_path / "thesis.txt").write_text("five years")
    for resume in (False, True):
        with pytest.raises(OutputError, match="exists already"):
            RunDirectory.create(tmp_path, record, resume=resume)
    assert visible_and_hidden(tmp_path) == ["thesis.txt"]


def test_path_below_a_file_is_one_clear_line(tmp_path, record):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another"):
        RunDirectory.create(tmp_path / "file" / "run", record)


def test_read_only_place_is_one_clear_line(small_disk, record):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="read-only"):
        RunDirectory.create(small_disk / "run", record)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_one_clear_line(tmp_path, record):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"):
        RunDirectory.create(tmp_path / "locked" / "run", record)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "settings"', "damaged"),
        ("[]", "damaged"),
        ('{"schema_version": 99, "versions": {"bruno-ray": "9.9"}}', "schema 99.*9.9"),
        ('{"schema_version": 1, "settings": {"modle": {}}}', "settings.modle"),
    ],
)
def test_damaged_or_foreign_run_json_is_refused(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputError, match=message):
        RunDirectory.open(tmp_path)


def test_run_is_found_by_path_by_name_and_with_a_trial(tmp_path, record, monkeypatch):
    runs = tmp_path / "runs"
    RunDirectory.create(runs / "mine", record)
    assert RunDirectory.find("mine", runs).path == runs / "mine"
    assert RunDirectory.find(runs / "mine", Path("elsewhere")).name == "mine"
    monkeypatch.chdir(tmp_path)
    for reference in ("mine:17", "runs/mine:17", f"{runs}/mine:17"):
        run, trial = find_trial(reference)
        assert (run.name, trial) == ("mine", 17)
    assert find_trial(str(runs / "mine"))[1] is None
    with pytest.raises(OutputError, match=r"yours.*mine"):
        RunDirectory.find("yours", runs)


def test_directions_survive_the_disk(tmp_path, record):
    run = RunDirectory.create(tmp_path / "a", record)
    with pytest.raises(OutputError, match="no directions yet"):
        run.load_directions()
    bank = {"difference_in_means@0": torch.randn(4, 2, 8), "pca@1": torch.randn(4, 1, 8).transpose(0, 0)}
    run.save_directions(bank)
    loaded = run.load_directions()
    assert loaded.keys() == bank.keys() and all(torch.equal(loaded[name], bank[name]) for name in bank)
    run.directions_file.write_bytes(run.directions_file.read_bytes()[:40])
    with pytest.raises(OutputError, match="damaged"):
        run.load_directions()


def test_trained_directions_lie_beside_the_bank(tmp_path, record):
    run = RunDirectory.create(tmp_path / "a", record)
    run.save_directions({"difference_in_means@0": torch.randn(4, 1, 8)})
    trained = torch.randn(4, 2, 8)
    run.save_learned("learned-0123456789ab", trained.numpy())
    run.save_learned("learned-0123456789ab", trained.numpy())
    assert run.load_bank().keys() == {"difference_in_means@0"}
    assert torch.equal(run.load_directions()["learned-0123456789ab"], trained)
    assert run.file_of_directions("difference_in_means@0") == run.directions_file
    run.file_of_directions("learned-0123456789ab").write_bytes(b"nonsense")
    with pytest.raises(OutputError, match=r"learned-0123456789ab\.safetensors is damaged"):
        run.load_directions()


def test_failed_json_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": float("nan")})
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert visible_and_hidden(tmp_path) == ["x.json"]


def test_full_disk_leaves_nothing_half_written(small_disk, record):
    run = RunDirectory.create(small_disk / "a", record)
    before = run.run_file.read_bytes()
    with pytest.raises(OutputError, match="disk is full"):
        run.update(extra={"ballast": "x" * 300_000})
    assert run.run_file.read_bytes() == before
    assert visible_and_hidden(run.path) == [".run.json.lock", "run.json"]
    with pytest.raises(OutputError, match="too full for the directions"):
        run.save_directions({"d": torch.zeros(100, 100, 10)})


@pytest.mark.parametrize("kind", ["file", "safetensors"])
def test_full_disk_leaves_no_half_written_folder(small_disk, kind):
    from safetensors.torch import save_file

    with pytest.raises(OutputError, match="disk is full"), atomic_directory(small_disk / "model") as aside:
        (aside / "config.json").write_text("{}")
        if kind == "file":
            (aside / "big").write_bytes(b"x" * 300_000)
        else:
            save_file({"w": torch.zeros(100_000)}, aside / "big.safetensors")
    assert visible_and_hidden(small_disk) == []


def test_require_free_space_names_both_figures(tmp_path):
    require_free_space(tmp_path / "not" / "there" / "yet", 1, "a byte")
    with pytest.raises(OutputError, match=r"needs [\d.]+ [kMGT]B and has [\d.]+ [kMGT]B free"):
        require_free_space(tmp_path, 10**18, "an exabyte")


def test_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as aside:
        (aside / "half").write_text("x")
        1 / 0  # noqa: B018
    assert visible_and_hidden(tmp_path) == []
    with atomic_directory(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "whole").write_text("x")
        assert not target.exists()
    assert visible_and_hidden(tmp_path) == ["model"] and (target / "sub" / "whole").read_text() == "x"
    with pytest.raises(OutputError, match="exists already"), atomic_directory(target):
        pass


def test_what_safetensors_writes_can_be_read_by_whoever_may_read_the_rest(tmp_path):
    """It makes files that only their owner may read."""
    tensors = {"a": torch.zeros(2)}
    (tmp_path / "plain").write_text("as open makes it")
    with atomic_file(tmp_path / "one.safetensors") as aside:
        save_file(tensors, aside)
    with atomic_directory(tmp_path / "folder") as aside:
        save_file(tensors, aside / "two.safetensors")
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "one.safetensors").stat().st_mode == expected
    assert (tmp_path / "folder" / "two.safetensors").stat().st_mode == expected


def test_remains_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    script = f"""
import os, pathlib
from bruno_ray.files import atomic_directory
with atomic_directory(pathlib.Path({str(tmp_path)!r}) / "model") as aside:
    (aside / "half").write_text("x")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60)
    assert len(visible_and_hidden(tmp_path)) == 1  # the kill left its temporary folder, but no `model`
    with atomic_directory(tmp_path / "model"):
        pass
    assert visible_and_hidden(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (3_100_000, "3.1 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (16.2e9, "16.2 GB"),
        (4.2e15, "4200.0 TB"),
    ],
)
def test_sizes_are_for_people(n_bytes, text):
    assert size_text(n_bytes) == text


# ----- users and their homes -----


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_that_cannot_be_written_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRUNO_CACHE", "/proc/none")
    with pytest.raises(OutputError, match=r"cannot write /proc/none/models.*: set BRUNO_CACHE to another folder"):
        with output_errors(cache_folder("models")):
            cache_folder("models").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"choose another output\.directory"):
        write_json(Path("/proc/other/run.json"), {})
    monkeypatch.delenv("BRUNO_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OutputError, match="no home directory: set BRUNO_CACHE"):
        cache_folder("models")
    with pytest.raises(OutputError, match=r"choose another output\.directory"):
        write_json(Path("/proc/other/run.json"), {})


def test_a_home_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~/runs") == Path.home() / "runs" and expanded("runs/~x") == Path("runs/~x")
    with pytest.raises(SettingsError, match="~no-such-user/x: there is no such home"):
        expanded("~no-such-user/x")

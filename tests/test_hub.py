"""`bruno-ray publish` against a hub over HTTP, through huggingface_hub itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bruno_ray.cli import main
from bruno_ray.errors import OutputError
from bruno_ray.publishing import hub
from tests.support import saved_run, tiny_models
from tests.support.inline_pool import use_inline_pools
from tests.support.model_hub import TOKEN, ModelHub, Repo
from tests.support.waiting import wait_for

CARD = "---\nlicense: apache-2.0\ntags:\n- bruno-ray\n---\n\n# A model\n"
BIG = 2**20 + 2**18


@pytest.fixture
def server() -> ModelHub:
    server = ModelHub()
    yield server
    server.close()


@pytest.fixture
def logged_in(server: ModelHub, monkeypatch: pytest.MonkeyPatch) -> ModelHub:
    """This process asks that hub."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What bruno-ray may have saved: two large files and two small ones."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for i in (1, 2):
        (folder / f"model-0000{i}-of-00002.safetensors").write_bytes(bytes([i]) * BIG)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(folder: Path, *options: str) -> int:
    return main.main(["publish", str(folder), "--repo", "me/mine", "--quiet", *options])


def test_all_of_a_folder_arrives_in_one_commit_and_private(
    logged_in: ModelHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(folder) == 0
    repo = logged_in.repos["me/mine"]
    assert repo.files == files_of(folder) and repo.private and len(repo.commits) == 1
    assert len(logged_in.uploads) == 2 and logged_in.asked("POST", "^/verify/") == 2
    printed = capsys.readouterr().out
    assert "model-00002-of-00002.safetensors" in printed and printed.splitlines()[-1] == f"{logged_in.url}/me/mine"
    assert "4 of 4 files, 2.6 MB, to me/mine (new, private), as me" in printed


def test_nothing_is_sent_twice(logged_in: ModelHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(folder) == 0 and publish(folder) == 0
    assert len(logged_in.uploads) == 2 and logged_in.asked("POST", "/commit/") == 1
    assert "0 of 4 files" in capsys.readouterr().out
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    logged_in.repos["me/mine"].files["notes.txt"] = b"of somebody else"
    assert publish(folder) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 files" in printed and "changed" in printed and "stays there: notes.txt" in printed
    assert logged_in.repos["me/mine"].files == {**files_of(folder), "notes.txt": b"of somebody else"}
    assert len(logged_in.uploads) == 2


def test_a_dry_run_changes_nothing(logged_in: ModelHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(folder, "--dry-run") == 0
    assert logged_in.repos == {} and logged_in.stored == {} and {method for method, _ in logged_in.requests} == {"GET"}
    printed = capsys.readouterr().out
    assert "4 of 4 files" in printed and printed.endswith("nothing was sent\n")


def test_killed_in_the_middle_it_goes_on(server: ModelHub, folder: Path, tmp_path: Path) -> None:
    """The first large file has arrived and half of the second when the process is killed."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "bruno_ray.cli.main", "publish", str(folder), "--repo", "me/mine"]
    server.hold_after = 1
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            wait_for(lambda: server.holding.is_set() or process.poll() is not None, "the second upload")
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(server.uploads) == 1 and server.repos["me/mine"].files == {}  # nothing half-published
    server.hold_after = None
    server.release.set()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert server.repos["me/mine"].files == files_of(folder)
    assert len(server.uploads) == len(set(server.uploads)) == 2  # the first was not sent again


def test_a_trial_is_saved_first_and_its_card_says_what_it_does(
    logged_in: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_inline_pools(monkeypatch)
    run = saved_run.make(saved_run.settings_for(tiny_models.write(tmp_path / "base"), tmp_path, ("l", "p")))
    asked = ["publish", f"{run.path}:1", "--repo", "team/edited", "--quiet"]
    assert main.main([*asked, "--dry-run"]) == 0
    assert "would be saved" in capsys.readouterr().out and not run.model_folder.exists() and not logged_in.repos
    assert main.main([*asked, "--public"]) == 0
    repo = logged_in.repos["team/edited"]
    assert not repo.private and repo.files == files_of(run.model_folder) and "reproduce.json" in repo.files
    data = ModelCard(repo.files["README.md"].decode()).data
    assert {result.metric_type for result in data.eval_results} >= {"behaviour_rate", "kl_divergence", "evasion_rate"}
    assert len(data.to_dict()["widget"]) == 3
    assert main.main([*asked, "--public"]) == 0  # saved already, and all of it is there
    assert len(repo.commits) == 1
    export = tmp_path / "adapter"
    assert main.main(["export", f"{run.path}:1", "--to", "lora", str(export), "--max-error", "0.5", "--quiet"]) == 0
    assert main.main(["publish", str(export), "--repo", "me/adapter", "--quiet"]) == 0
    files = logged_in.repos["me/adapter"].files
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
    assert ModelCard(files["README.md"].decode()).data.library_name == "peft"


def test_save_refuses_an_upload_before_it_saves(
    logged_in: ModelHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run.make(saved_run.settings_for(tiny_models.write(tmp_path / "base"), tmp_path, ("l", "p")))
    assert main.main(["save", f"{run.path}:1", "--upload", "them/edited"]) == 2
    assert "me may not write to them" in capsys.readouterr().err and not run.model_folder.exists()


@pytest.mark.parametrize(
    ("prepare", "repo", "said"),
    [
        ({"token": "hf_wrong"}, "me/mine", "does not accept the login"),
        ({"token": None}, "me/mine", "not logged in"),
        ({"role": "read"}, "me/mine", "the token of me may only read"),
        ({}, "them/mine", "me may not write to them: use a name below me, team"),
        ({}, "mine", "mine is not a repository name: use owner/name"),
        ({}, "me/mi ne", "me/mi ne is not a repository name"),
        ({"public": True}, "me/mine", "me/mine is public: add --public"),
        ({"failing": ("whoami", 503)}, "me/mine", r"busy or out of order \(status 503\): run it again later"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    logged_in: ModelHub,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: dict,
    repo: str,
    said: str,
) -> None:
    logged_in.role = prepare.get("role", "write")
    if prepare.get("public"):
        logged_in.repos["me/mine"] = Repo(private=False)
    if "failing" in prepare:
        logged_in.failing = {prepare["failing"][0]: [prepare["failing"][1]] * 9}
    if "token" in prepare:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
        if prepare["token"]:
            monkeypatch.setenv("HF_TOKEN", prepare["token"])
    with pytest.raises(OutputError, match=said) as error:
        hub.check(repo)
    assert "\n" not in str(error.value) and {method for method, _ in logged_in.requests} <= {"GET"}


@pytest.mark.parametrize(
    ("path", "statuses", "said"),
    [
        ("/repos/create", [403], "the token may not write to me/mine"),
        ("/preupload/", [404], r"does not find me/mine \(status 404\)"),
        ("/commit/", [409], r"has changed in the meantime \(status 409\): run it again"),
        ("/storage/", [403], "the token may not write"),
    ],
)
def test_what_goes_wrong_while_sending_is_one_line(
    logged_in: ModelHub, folder: Path, path: str, statuses: list[int], said: str
) -> None:
    logged_in.failing = {path: statuses}
    plan = hub.plan(folder, hub.check("me/mine"))
    with pytest.raises(OutputError, match=said) as error:
        hub.send(plan)
    assert "\n" not in str(error.value)
    assert all(not repo.files for repo in logged_in.repos.values())
    hub.send(hub.plan(folder, hub.check("me/mine")))  # and again, when it has passed
    assert logged_in.repos["me/mine"].files == files_of(folder)


def test_a_hiccup_of_the_storage_is_sat_out(logged_in: ModelHub, folder: Path) -> None:
    logged_in.failing = {"/storage/": [503]}
    hub.send(hub.plan(folder, hub.check("me/mine")))
    assert logged_in.repos["me/mine"].files == files_of(folder)


def test_a_card_that_the_hub_refuses_is_said_before_the_upload(logged_in: ModelHub, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace("apache-2.0", "My own!"))
    with pytest.raises(OutputError, match='"license" must be one of'):
        hub.send(hub.plan(folder, hub.check("me/mine")))
    assert logged_in.uploads == [] and logged_in.repos == {}


def test_folders_of_others_are_refused(logged_in: ModelHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n")
    with pytest.raises(OutputError, match="not a model or an export that bruno-ray wrote"):
        hub.require_publishable(tmp_path)
    assert publish(tmp_path) == 2 and logged_in.requests == []


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match="the hub cannot be reached"):
        hub.check("me/mine")

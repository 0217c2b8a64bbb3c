"""What travels with a job: Ray's own packer, with our patterns, leaves secrets where they are and says which."""

import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from cluster.cli.jobs import checked_excludes
from cluster.errors import ClusterSettingsError
from cluster.jobs.upload import SHOWN, left_out, left_out_line

HARMLESS = ["mine.toml", "prompts/target.jsonl", "keys.py", "environment.yml", "sub/identity.py", "sub/token.json"]
SECRET = [
    *(".env", ".env.local", "sub/.env", "prod.env", ".netrc", ".aws/credentials", ".ssh/config", "sub/.ssh/id_work"),
    *("server.pem", "sub/deep/host.key", "id_rsa", "id_ed25519.pub", ".huggingface/token", ".cache/huggingface/token"),
    *("vast_api_key", ".bruno-ray/clusters/c/auth_token", ".docker/config.json", "credentials.json"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a .gitignore that wants the secrets in, and a virtual environment."""
    folder = tmp_path / "work"
    for name in (*HARMLESS, *SECRET, ".venv/lib/cacert.pem", "runs/r/.env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("!.env\n!*.pem\n")
    return folder


def sent(folder: Path, excludes: list[str]) -> set[str]:
    """Files that Ray packs."""
    package = folder.parent / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")} - {".gitignore"}


def test_no_secret_leaves_this_machine_and_each_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sent(folder, checked_excludes(folder, [], [])) == set(HARMLESS)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "look like secrets" in said and ".aws/" in said
    named = left_out(folder, [])
    assert all(any(name == there or name.startswith(there) for there in named) for name in SECRET)
    assert not any(name.startswith((".venv", "runs")) for name in named), "what does not travel anyway is no news"


def test_a_pattern_of_the_user_cannot_let_secrets_out_by_accident(folder: Path) -> None:
    assert sent(folder, checked_excludes(folder, ["*.jsonl", "!*"], [])).isdisjoint(SECRET)


def test_what_is_included_by_name_goes_along_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    excludes = checked_excludes(folder, ["keys.py"], [".env", "./sub/deep/host.key", ".aws/"])
    went = sent(folder, excludes)
    assert went == {*HARMLESS, ".env", "sub/deep/host.key", ".aws/credentials"} - {"keys.py"}
    assert "host.key" not in capsys.readouterr().out
    named = left_out(folder, [".env", "./sub/deep/host.key", ".aws/"])
    assert "sub/.env" in named and not {".env", "sub/deep/host.key", ".aws/"} & set(named)


@pytest.mark.parametrize("name", ["nowhere", "../outside"])
def test_what_is_not_in_the_folder_cannot_be_included(folder: Path, name: str) -> None:
    (folder.parent / "outside").touch()
    with pytest.raises(ClusterSettingsError, match="--include"):
        checked_excludes(folder, [], [name])


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ClusterSettingsError, match="--working-dir"):
        checked_excludes(tmp_path / "none", [], [])


def test_the_line_stays_one_line() -> None:
    line = left_out_line([f"{number}.pem" for number in range(SHOWN + 3)])
    assert "and 3 more" in line and "\n" not in line and len(line) < 200

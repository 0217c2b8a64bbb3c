"""Set-up of a node uses the image's torch where it is the one that is pinned, and never brings a second."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.cluster.lab.container import CHECKOUT

PYTHON = ".".join(map(str, sys.version_info[:2]))
UV = """\
#!/bin/sh
echo "$*" >> "$HOME/asked"
[ "$1" != venv ] || { for last; do :; done; mkdir -p "$last/bin"; ln -s "$(command -v python3)" "$last/bin/python"; }
"""
"""Stands where the download would be: notes what it is asked, and makes an environment that has nothing."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of a node to which a checkout has been copied."""
    home = tmp_path / "home"
    (home / "bruno-ray").mkdir(parents=True)
    shutil.copy(CHECKOUT / "constraints.txt", home / "bruno-ray")
    (home / ".bruno-ray").mkdir()
    (home / ".bruno-ray" / "laptop_versions.json").write_text(f'{{"python": "{PYTHON}", "ray": "2"}}')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(UV)
    for program in ("uv", "rsync", "ssh", "sshd", "uptime"):  # the last four are only looked for
        (tmp_path / "bin" / program).touch()
        (tmp_path / "bin" / program).chmod(0o755)
    return home


def image_with_torch(folder: Path, version: str) -> Path:
    """An environment of this Python that has torch, as far as its metadata say."""
    venv.create(folder, with_pip=False)
    metadata = folder / "lib" / f"python{PYTHON}" / "site-packages" / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


def set_up(home: Path, image: Path) -> list[str]:
    """Run the script as `ray up` does; what uv was asked for."""
    environment = {
        "HOME": str(home),
        "PATH": f"{home.parent / 'bin'}:{os.environ['PATH']}",
        "BRUNO_IMAGE_ENVIRONMENTS": f"{home / 'nothing'} {image}",
    }
    script = CHECKOUT / "cluster" / "scripts" / "setup_node.sh"
    subprocess.run(["bash", str(script)], env=environment, check=True)
    return (home / "asked").read_text().splitlines()


def pinned_torch() -> str:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def test_the_environment_is_the_image_s_where_its_torch_is_the_pinned_one(home: Path, tmp_path: Path) -> None:
    image = image_with_torch(tmp_path / "image", f"{pinned_torch()}+cu128")
    (asked,) = set_up(home, image)
    assert asked.startswith("pip install") and "-c constraints.txt" in asked
    assert (home / ".bruno-ray" / "venv").resolve() == image
    assert set_up(home, image) == [asked, asked], "the second time as well"


def test_another_torch_is_left_alone(home: Path, tmp_path: Path) -> None:
    image = image_with_torch(tmp_path / "image", "2.4.1+cu124")
    made, asked = set_up(home, image)
    assert made.startswith("venv") and f"--python {PYTHON}" in made and asked.startswith("pip install")
    assert (home / ".bruno-ray" / "venv").resolve() != image

"""crewai in an environment of its own: it pins other versions of what we use."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from bruno_ray.cache import cache_folder

AGENTS = Path(__file__).parents[2] / "examples" / "agents"


@pytest.fixture(scope="session")
def crewai_python() -> Path:
    """Python of an environment with what examples/agents/requirements.txt asks for, made once per machine."""
    requirements = (AGENTS / "requirements.txt").read_text()
    folder = cache_folder("test-env-crewai")
    done, python = folder / "requirements.txt", folder / "bin" / "python"
    if not done.exists() or done.read_text() != requirements:
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv")
        if uv:
            subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
            install = [uv, "pip", "install", "-q", "--python", python]
        else:
            venv.create(folder, with_pip=True)
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        got = subprocess.run([*install, "-r", AGENTS / "requirements.txt"], capture_output=True, text=True, timeout=500)
        if got.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"crewai cannot be installed here: {got.stderr[-300:]}")
        done.write_text(requirements)
    return python

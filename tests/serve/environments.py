"""Other people's clients in environments of their own, made once per machine: they pin versions against each other."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from bruno_ray.files import cache_folder
from tests.serve.server import Server, environment

CLIENTS = Path(__file__).parent / "clients"

# litellm, langchain-openai and lm-eval agree on openai 2; openai 3 is in our own environment.
OPENAI_2 = (
    "openai==2.54.0",
    "litellm==1.106.2",
    "langchain-openai==1.7.3",
    "llm==0.32.1",
    "lm-eval[api]==0.4.13",
    "transformers==5.23.0",
)


def make_environment(name: str, requirements: tuple[str, ...]) -> Path:
    """Python of an environment with these packages. Skips the test where they cannot be had."""
    folder = cache_folder(f"test-env-{name}")
    done, python = folder / "requirements.txt", folder / "bin" / "python"
    wanted = "\n".join(requirements)
    if done.exists() and done.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", python]
    else:
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    got = subprocess.run([*install, *requirements], capture_output=True, text=True, timeout=900)
    if got.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"{name} cannot be installed here: {got.stderr[-300:]}")
    done.write_text(wanted)
    return python


def run_client(python: Path | str, script: str, server: Server, folder: Path, **variables: str) -> str:
    """Run ``clients/script`` against the server; its assertions are the test. Returns what it prints."""
    given = {
        "OPENAI_BASE_URL": server.base_url,
        "OPENAI_API_KEY": server.key,
        "MODEL": server.base,
        "EDITED": server.selected,
        "SAVED": server.saved,
        "RUN": str(server.run),
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **variables,
    }
    done = subprocess.run(
        [str(python), str(CLIENTS / script)],
        cwd=folder, env={**environment(), **given}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout

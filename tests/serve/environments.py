"""Other people's clients in environments of their own, made once per machine: they pin versions against each other."""

import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

from bruno_ray.files import cache_folder
from tests.serve.server import ROOT, START_SECONDS, Server, environment

CLIENTS = Path(__file__).parent / "clients"
AGENTS = ROOT / "examples" / "agents"

# litellm, langchain-openai and lm-eval agree on openai 2; openai 3 is in our own environment.
OPENAI_2 = (
    "openai==2.54.0",
    "litellm==1.106.2",
    "langchain-openai==1.7.3",
    "llm==0.32.1",
    "lm-eval[api]==0.4.13",
    "transformers==5.23.0",
)
ENVIRONMENTS = {"openai-2": OPENAI_2, "crewai": tuple((AGENTS / "requirements.txt").read_text().splitlines())}

TEAM = """
base_url = "{base_url}"
temperature = 0
max_tokens = {max_tokens}
[orchestrator]
model = "{orchestrator}"
role = "P"
goal = "p"
backstory = "p"
[[specialist]]
name = "first"
model = "{first}"
role = "F"
goal = "f"
backstory = "f"
[[specialist]]
name = "second"
model = "{second}"
role = "S"
goal = "s"
backstory = "s"
"""


def python_of(name: str) -> Path:
    """Python of the environment of that name. Skips the test where its packages cannot be had."""
    folder = cache_folder(f"test-env-{name}")
    done, python = folder / "requirements.txt", folder / "bin" / "python"
    wanted = "\n".join(ENVIRONMENTS[name])
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if done.exists() and done.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        if uv := shutil.which("uv"):
            subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
            install = [uv, "pip", "install", "-q", "--python", python]
        else:
            venv.create(folder, with_pip=True)
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        got = subprocess.run([*install, *ENVIRONMENTS[name]], capture_output=True, text=True, timeout=900)
        if got.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"{name} cannot be installed here: {got.stderr[-300:]}")
        done.write_text(wanted)
    return python


@dataclass(frozen=True)
class Client:
    """A client that others wrote, and how it is run; names of models are attributes of the server."""

    script: str
    environment: str | None = None
    """None is our own."""

    model: str = "base"
    edited: str = "selected"
    in_folder: dict[str, str] = field(default_factory=dict)
    """Variables that name something in the folder it is run in."""

    def run(self, server: Server, folder: Path) -> str:
        """Its assertions are the test. Returns what it prints."""
        python = sys.executable if self.environment is None else python_of(self.environment)
        shutil.copytree(CLIENTS / "tasks", folder / "tasks")
        shutil.copy(folder / "tasks" / "facts.jsonl", folder)
        given = {
            "OPENAI_BASE_URL": server.base_url,
            "OPENAI_API_KEY": server.key,
            "MODEL": getattr(server, self.model),
            "EDITED": getattr(server, self.edited),
            "SAVED": server.saved,
            "RUN": str(server.run),
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **{name: str(folder / place) for name, place in self.in_folder.items()},
        }
        done = subprocess.run(
            [str(python), str(CLIENTS / self.script)],
            cwd=folder, env={**environment(), **given}, capture_output=True, text=True, timeout=START_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


OPENAI_3 = Client("openai_sdk.py")
OPENAI_2_SDK = Client("openai_sdk.py", "openai-2")
RECORDED = {
    "litellm": Client("litellm_client.py", "openai-2"),
    "langchain": Client("langchain_client.py", "openai-2"),
    "llm": Client("llm_client.py", "openai-2", in_folder={"LLM_USER_PATH": "llm"}),
    "lm_eval": Client("lm_eval_client.py", "openai-2", model="saved", in_folder={"TASKS": "tasks", "HF_HOME": "hub"}),
    # Its prompts are longer than the organism's context.
    "crewai": Client(
        "crewai_client.py", "crewai", model="talkative", edited="talkative",
        in_folder={"HOME": "", "CREWAI_STORAGE_DIR": ""},
    ),
}  # fmt: skip
"""Clients whose requests are in ``clients/recorded``, for the tests that have no registry."""


def run_team(
    python: Path | str, folder: Path, *arguments: str, key: str, **team: object
) -> "subprocess.CompletedProcess[str]":
    """The example team, each role with the model that ``team`` names."""
    (folder / "team.toml").write_text(TEAM.format(**team))
    command = [str(python), str(AGENTS / "team.py"), "Hi", "--config", str(folder / "team.toml"), *arguments]
    # crewai keeps notes of its own in the home folder; proxies would be asked for 127.0.0.1.
    variables = {"HOME": str(folder), "BRUNO_API_KEY": key, "NO_PROXY": "*", "no_proxy": "*"}
    return subprocess.run(
        command, capture_output=True, text=True, env={**environment(), **variables}, timeout=START_SECONDS, cwd=folder
    )

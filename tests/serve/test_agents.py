"""The example team: every role asks the model that is its own, and the answers reach those who need them.

CrewAI comes from the registry: what it sends is recorded, see ``test_recorded_clients.py``.
"""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.serve.environments import python_of, run_team
from tests.serve.server import Server

pytestmark = pytest.mark.slow

NAMES = {"orchestrator": "base", "first": "base:trial-3", "second": "runs/mine"}


class ScriptedModel(ThreadingHTTPServer):
    """An OpenAI-shaped endpoint in which every model says its name; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.asked: list[tuple[str, dict]] = []  # (Authorization header, body)


class ScriptedHandler(BaseHTTPRequestHandler):
    server: ScriptedModel

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.headers["Authorization"], body))
        message = {"role": "assistant", "content": f"the word of {body['model']}"}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5},
        }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[ScriptedModel]:
    with ScriptedModel() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_mistake_in_the_teams_file_is_said_in_one_line(tmp_path: Path) -> None:
    """Before anything of CrewAI is loaded: our own interpreter has none."""
    team = {"base_url": "http://127.0.0.1:1/v1", "max_tokens": 20, **NAMES}
    wrong = run_team(sys.executable, tmp_path, "--only", "third", key="a-key", **team)
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "there is no specialist third: there are first, second"


@pytest.mark.nightly
def test_each_role_asks_its_own_model(scripted: ScriptedModel, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{scripted.server_port}/v1"
    team = {"base_url": url, "max_tokens": 20, **NAMES}
    done = run_team(python_of("crewai"), tmp_path, "--output", "out.md", key="a-key", **team)
    assert done.returncode == 0, done.stderr[-2000:]

    bodies = [body for _, body in scripted.asked]
    assert [body["model"] for body in bodies] == ["base", "base:trial-3", "runs/mine", "base"]
    assert {header for header, _ in scripted.asked} == {"Bearer a-key"}
    roles = [body["messages"][0]["content"].split(".")[0] for body in bodies]
    assert roles == ["You are P", "You are F", "You are S", "You are P"]
    # The specialists are given the plan, the orchestrator what both specialists said.
    said = [body["messages"][-1]["content"] for body in bodies]
    assert all("the word of base\n" in text for text in said[1:3])
    assert "the word of base:trial-3" in said[3] and "the word of runs/mine" in said[3]
    assert (tmp_path / "out.md").read_text() == "the word of base\n"
    assert not any("tools" in body for body in bodies)


@pytest.mark.nightly
def test_only_some_of_the_team(scripted: ScriptedModel, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{scripted.server_port}/v1"
    team = {"base_url": url, "max_tokens": 20, **NAMES}
    done = run_team(python_of("crewai"), tmp_path, "--only", "second", key="a-key", **team)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [body["model"] for _, body in scripted.asked] == ["base", "runs/mine", "base"]


@pytest.mark.nightly
@pytest.mark.ray
def test_on_a_served_base_trial_and_selected_trial(server: Server, tmp_path: Path) -> None:
    """The organism cannot follow such prompts; that each role is answered by its model is what matters."""
    names = {"orchestrator": server.base, "first": server.trials[0], "second": server.selected}
    team = {"base_url": server.base_url, "max_tokens": 6, **names}
    done = run_team(python_of("crewai"), tmp_path, key=server.key, **team)
    assert done.returncode == 0, done.stderr[-2000:]
    for role, model in (("P", server.base), ("F", server.trials[0]), ("S", server.selected)):
        assert f"--- {role} ({model})" in done.stdout

    wrong = run_team(python_of("crewai"), tmp_path, key="not the key", **team)
    assert wrong.returncode != 0 and "401" in wrong.stderr

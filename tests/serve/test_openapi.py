"""schemathesis over the API's own description: no server error, no status and no shape that is not in it."""

import re
import subprocess
import sys

import pytest

from tests.serve.server import START_SECONDS, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXAMPLES = 25


def test_schemathesis_finds_nothing(server, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    options = ["--header", f"Authorization: Bearer {server.key}", "--checks", CHECKS, "--max-examples", str(EXAMPLES),
               "--seed", "1", "--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--no-color",
               "--generation-database", "none", "--suppress-health-check", "all"]  # fmt: skip
    hooks = {"SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks", "SERVED_MODEL": server.base}
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env={**environment(), **hooks, "COLUMNS": "120"},
        capture_output=True, text=True, timeout=START_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    generated, passed = map(int, re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups())
    assert generated == passed > 500
    answered = server.get("/metrics").text
    for route in ("/v1/chat/completions", "/v1/completions"):
        assert f'{{route="{route}",status="200"}}' in answered  # it did not only meet refusals
        assert f'{{route="{route}",status="400"}}' in answered


def test_every_route_says_which_errors_it_may_give(server):
    described = server.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert {"200", "202"} & set(operation["responses"]), (path, method)
            assert {"401", "405", "413"} <= set(operation["responses"]), (path, method)
            assert "422" not in operation["responses"], (path, method)  # FastAPI's own: ours is 400
    for path in ("/v1/chat/completions", "/v1/completions"):
        responses = described["paths"][path]["post"]["responses"]
        assert {"400", "404", "408", "429", "503"} <= set(responses)
        assert "text/event-stream" in responses["200"]["content"]

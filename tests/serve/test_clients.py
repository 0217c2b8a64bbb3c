"""Clients that others wrote, unmodified, against the real application."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.serve.environments import CLIENTS, OPENAI_2, make_environment, run_client
from tests.serve.server import serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest_plugins = ["tests.serve.crewai_environment"]


@pytest.fixture(scope="session")
def openai_2() -> Path:
    return make_environment("openai-2", OPENAI_2)


def test_openai_3(server, tmp_path):
    assert run_client(sys.executable, "openai_sdk.py", server, tmp_path).startswith("openai 3.")


def test_openai_2(server, openai_2, tmp_path):
    assert run_client(openai_2, "openai_sdk.py", server, tmp_path).startswith("openai 2.")


def test_litellm(server, openai_2, tmp_path):
    run_client(openai_2, "litellm_client.py", server, tmp_path)


def test_langchain(server, openai_2, tmp_path):
    run_client(openai_2, "langchain_client.py", server, tmp_path)


def test_llm(server, openai_2, tmp_path):
    run_client(openai_2, "llm_client.py", server, tmp_path, LLM_USER_PATH=str(tmp_path / "llm"))


def test_lm_eval_likelihoods_equal_a_forward_pass(server, openai_2, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks = shutil.copytree(CLIENTS / "tasks", tmp_path / "tasks")
    shutil.copy(tasks / "facts.jsonl", tmp_path)
    run_client(openai_2, "lm_eval_client.py", server, tmp_path, MODEL=server.saved, TASKS=str(tasks),
               HF_HOME=str(tmp_path / "hub"))  # fmt: skip
    found = json.loads((tmp_path / "lm_eval.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(server.run / "model")
    model = AutoModelForCausalLM.from_pretrained(server.run / "model")

    def loglikelihood(context: str, continuation: str) -> tuple[float, bool]:
        """As lm-eval splits them: the continuation's tokens are what the whole has more than the context."""
        n_context = len(tokenizer.encode(context, add_special_tokens=False))
        ids = torch.tensor([tokenizer.encode(context + continuation, add_special_tokens=False)])
        with torch.inference_mode():
            logprobs_TV = model(ids).logits[0, n_context - 1 : -1].float().log_softmax(-1)
        chosen = ids[0, n_context:]
        picked = logprobs_TV.gather(1, chosen[:, None])
        return float(picked.sum()), bool((logprobs_TV.argmax(-1) == chosen).all())

    for tokenized in ("True", "False"):
        n = 0
        for sample in found[tokenized]:
            arguments = sample["arguments"]
            for asked, answered in zip(pairs(arguments), sample["resps"]):
                value, is_greedy = answered[0]
                expected, expected_greedy = loglikelihood(*asked)
                assert float(value) == pytest.approx(expected, abs=1e-3), (tokenized, asked)
                assert str(is_greedy) == str(expected_greedy)
                n += 1
        assert n == 8
    assert found["answers True"] == found["answers False"]
    assert found["accuracy True"] == found["accuracy False"]


def pairs(arguments) -> list[tuple[str, str]]:
    """(context, continuation) of each request, however this version of lm-eval writes them down."""
    if isinstance(arguments, dict):
        return [(entry["arg_0"], entry["arg_1"]) for entry in arguments.values()]
    return [tuple(entry[:2]) for entry in arguments]


def test_crewai(served_run, crewai_python, tmp_path):
    """Its prompts are longer than the organism's context, so that is stretched; what it answers does not matter."""
    model = shutil.copytree(served_run / "model", tmp_path / "long")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    with serving(tmp_path, "--model", str(model), "--no-pages") as server:
        run_client(crewai_python, "crewai_client.py", server, tmp_path, MODEL="long", EDITED="long",
                   HOME=str(tmp_path), CREWAI_STORAGE_DIR=str(tmp_path), PATH=os.environ["PATH"])  # fmt: skip

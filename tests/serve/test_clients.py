"""Clients that others wrote, unmodified, against the real application.

The openai SDK is in our own environment; the others come from the registry into environments of their own, and their
recorded requests stand for them in the tests of every day (``test_recorded_clients.py``).
"""

import json
import os
from pathlib import Path

import pytest

from tests.serve.clients.recorder import NAMES, read, run_recorded, write
from tests.serve.environments import OPENAI_2_SDK, OPENAI_3
from tests.serve.server import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_openai_3(server: Server, tmp_path: Path) -> None:
    assert OPENAI_3.run(server, tmp_path).startswith("openai 3.")


@pytest.mark.nightly
def test_openai_2(server: Server, tmp_path: Path) -> None:
    assert OPENAI_2_SDK.run(server, tmp_path).startswith("openai 2.")


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_client_works_and_sends_what_is_recorded_of_it(server: Server, name: str, tmp_path: Path) -> None:
    sent = run_recorded(name, server, tmp_path)
    if os.environ.get("RECORD_CLIENTS"):
        write(name, sent)
    assert sorted(map(repr, (entry.shape for entry in sent))) == sorted(
        map(repr, (entry.shape for entry in read(name)))
    ), f"{name} sends other requests than it did: record them again, see tests/serve/clients/recorder.py"
    if name == "lm_eval":
        check_likelihoods(server, json.loads((tmp_path / "lm_eval.json").read_text()))


def check_likelihoods(server: Server, found: dict) -> None:
    """What lm-eval was told equals a forward pass."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
            for asked, answered in zip(pairs(sample["arguments"]), sample["resps"]):
                value, is_greedy = answered[0]
                expected, expected_greedy = loglikelihood(*asked)
                assert float(value) == pytest.approx(expected, abs=1e-3), (tokenized, asked)
                assert str(is_greedy) == str(expected_greedy)
                n += 1
        assert n == 8
    assert found["answers True"] == found["answers False"]
    assert found["accuracy True"] == found["accuracy False"]


def pairs(arguments: dict | list) -> list[tuple[str, str]]:
    """(context, continuation) of each request, however this version of lm-eval writes them down."""
    if isinstance(arguments, dict):
        return [(entry["arg_0"], entry["arg_1"]) for entry in arguments.values()]
    return [tuple(entry[:2]) for entry in arguments]

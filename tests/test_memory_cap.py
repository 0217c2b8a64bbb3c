"""Where memory is short, batches shrink, the work goes on, and the answers are the same."""

import json
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.loading import LoadedModel
from tests.support import tiny_models
from tests.support.engine_helpers import bank_of, loaded_from

PROMPTS, LENGTH, TOKENS = 24, 256, 3
ROOM = 10 * 2**20
"""Bytes beyond what the process has. The mask alone of all prompts in one batch takes 13 MB."""

KERNEL = AblationParameters(1.0, 1.0, 0.5, 2.0)


def results(loaded: LoadedModel, row_tokens: int) -> tuple[list, list, int]:
    """Answers and next logits, unedited and edited, and the largest batch that was left in the end."""
    engine = BatchEngine(loaded, row_tokens)
    edit = Edit(dict.fromkeys(loaded.architecture.components, KERNEL), next(iter(bank_of(loaded))), 1.3, "full")
    edits = [None, *engine.editor.resolve_all([edit], bank_of(loaded))]
    ids = torch.randint(0, 256, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    answers = [[list(answer.token_ids) for answer in row] for row in engine.generate(ids, edits, TOKENS)]
    logits = engine.next_logits(ids, edits).tolist()
    tokens = engine.answer_tokens
    engine.editor.close()
    return answers, logits, tokens


def all_at_once() -> int:
    return 2 * PROMPTS * (LENGTH + TOKENS)


def capped() -> None:
    """In a process of its own: what is allocated beyond ROOM is refused by the kernel."""
    torch.set_num_threads(1)
    loaded = loaded_from(tiny_models.build("llama"))
    results(loaded, 4 * (LENGTH + TOKENS))  # whatever is made once
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    print(json.dumps(results(loaded, all_at_once())))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_with_too_little_memory_answers_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_memory_cap import capped; capped()"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers, logits, tokens = json.loads(done.stdout.splitlines()[-1])
    wanted_answers, wanted_logits, wanted_tokens = results(loaded_from(tiny_models.build("llama")), all_at_once())
    assert tokens < wanted_tokens / 2
    assert answers == wanted_answers
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(wanted_logits), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_too_little_memory_on_a_gpu_answers_are_the_same() -> None:
    loaded = replace(loaded_from(tiny_models.build("llama").cuda()), device=torch.device("cuda"))
    wanted_answers, wanted_logits, wanted_tokens = results(loaded, all_at_once())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ROOM) / total)
    try:
        answers, logits, tokens = results(loaded, all_at_once())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tokens < wanted_tokens / 2
    assert answers == wanted_answers
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(wanted_logits), rtol=1e-3, atol=1e-3)

"""The engine on a GPU: the same equalities as on a CPU."""

import pytest
import torch

from tests.support import tiny_models
from tests.support.engine_helpers import answers, edited_copy, engine_of, is_greedy, loaded_from, prompt, request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_rows_of_eight_edits_equal_the_baked_models_on_a_gpu(family: str) -> None:
    loaded = loaded_from(tiny_models.build(family).cuda())
    loaded.device = torch.device("cuda", 0)
    keys = [None, *map(str, range(8))]
    asked = [
        request(prompt(3 + 5 * i, seed=i), key, 4 + 2 * i, ignore_eos=True, top_logprobs=2 if i % 3 else None)
        for i, key in enumerate(keys)
    ]
    asked += [request(prompt(9), key, 12, temperature=0.9, top_p=0.8, seed=1) for key in keys]
    with engine_of(loaded, prefill_tokens=16, kv_tokens=2048) as engine:
        found, again = answers(engine, asked), answers(engine, asked[-1:])
    for one, event in zip(asked, found):
        assert event.finish_reason in ("length", "stop"), event.error
        if one.temperature == 0:
            assert is_greedy(edited_copy(loaded, one.edit).cpu(), one.prompt_ids, event.token_ids)
    assert found[-1].token_ids == again[0].token_ids

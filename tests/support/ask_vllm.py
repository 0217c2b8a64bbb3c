"""Run by a Python that has vLLM and the plug-in: what models give to prompts.

    python ask_vllm.py '[{"model": FOLDER, "prompts": [[1, 2], ...], "tokens": 4, "engine": {...}}, ...]'

One process asks all of them, one after the other: importing vLLM is most of the time. Prints a line of JSON for each,
{"chosen": [[ids]], "prompt_logprobs": [[of every prompt token but the first]]} or {"error": "..."}.
"""

import gc
import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def main(jobs: list[dict]) -> None:
    for job in jobs:
        try:
            found = ask(job)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(job: dict) -> dict[str, list]:
    llm = LLM(model=job["model"], max_model_len=256, max_num_seqs=8, seed=0, **job["engine"])
    wanted = SamplingParams(temperature=0, max_tokens=job["tokens"], prompt_logprobs=0, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], wanted, use_tqdm=False)
    return {
        "chosen": [list(answer.outputs[0].token_ids) for answer in answers],
        "prompt_logprobs": [
            [given[token].logprob for token, given in zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:])]
            for answer in answers
        ],
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

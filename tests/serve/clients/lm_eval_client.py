"""lm-eval: multiple choice and generation through local-completions, generation through local-chat-completions.

Writes every log-likelihood it was told to lm_eval.json, for comparison with a forward pass.
"""

import json
import os
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL = os.environ["OPENAI_BASE_URL"], os.environ["MODEL"]
tasks = TaskManager(include_path=os.environ["TASKS"], include_defaults=False)
common = {"model": MODEL, "num_concurrent": 2, "max_retries": 1, "tokenizer": f"{os.environ['RUN']}/model"}
found = {}
for tokenized in (True, False):
    arguments = {**common, "base_url": f"{URL}/completions", "tokenized_requests": tokenized, "max_length": 256,
                 "tokenizer_backend": "huggingface"}  # fmt: skip
    results = lm_eval.simple_evaluate(
        "local-completions", arguments, tasks=["facts_choice", "facts_answer"], task_manager=tasks, log_samples=True,
        bootstrap_iters=0, batch_size=4,
    )  # fmt: skip
    found[str(tokenized)] = [
        {"arguments": sample["arguments"], "resps": sample["resps"]} for sample in results["samples"]["facts_choice"]
    ]
    answers = [sample["resps"][0][0] for sample in results["samples"]["facts_answer"]]
    assert all(isinstance(answer, str) and answer for answer in answers), answers
    found[f"answers {tokenized}"] = answers
    found[f"accuracy {tokenized}"] = results["results"]["facts_choice"]["acc,none"]

chat = lm_eval.simple_evaluate(
    "local-chat-completions", {**common, "base_url": f"{URL}/chat/completions"}, tasks=["facts_answer"],
    task_manager=tasks, log_samples=True, bootstrap_iters=0, apply_chat_template=True,
)  # fmt: skip
found["chat"] = [sample["resps"][0][0] for sample in chat["samples"]["facts_answer"]]
assert all(found["chat"]), found["chat"]
Path("lm_eval.json").write_text(json.dumps(found))

"""For schemathesis: half of the requests are about a model that is served, small, with fields that may go together.

The others are left as they were made.
"""

import hashlib
import os

import schemathesis

LIMITS = {"n": 2, "max_tokens": 8, "max_completion_tokens": 8, "samples": 2}
KEPT = {"model", "messages", "prompt", "max_tokens", "n", "stream", "seed", "echo", "user", "top_p", "temperature"}
GENERATING = {"messages", "prompt"}


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict) or hashlib.sha256(repr(body).encode()).digest()[0] % 2:
        return body
    if GENERATING & body.keys():
        body = {name: value for name, value in body.items() if name in KEPT}
    if isinstance(body.get("prompt"), list):  # token ids are drawn from all integers
        body["prompt"] = [str(item) for item in body["prompt"][:3]] or "a word"
    if isinstance(body.get("model"), str):
        body["model"] = os.environ["SERVED_MODEL"]
    for name, limit in LIMITS.items():
        if type(body.get(name)) is int:
            body[name] = min(body[name], limit)
    messages = body.get("messages")
    if isinstance(messages, list):
        body["messages"] = [{**m, "role": "user"} if isinstance(m, dict) and "role" in m else m for m in messages[:3]]
    return body

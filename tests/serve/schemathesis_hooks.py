"""For schemathesis: a half of the requests is about a model that is served, small, and without what contradicts itself.

The others are left as they were made.
"""

import hashlib
import os

import schemathesis

LIMITS = {"n": 2, "max_tokens": 8, "max_completion_tokens": 8, "samples": 2}
NEED_OTHERS = ("stream_options", "top_logprobs", "max_completion_tokens", "best_of", "suffix")


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict) or hashlib.sha256(repr(body).encode()).digest()[0] % 2:
        return body
    body = {name: value for name, value in body.items() if name not in NEED_OTHERS}
    if isinstance(body.get("model"), str):
        body["model"] = os.environ["SERVED_MODEL"]
    for name, limit in LIMITS.items():
        if type(body.get(name)) is int:
            body[name] = min(body[name], limit)
    messages = body.get("messages")
    if isinstance(messages, list):
        body["messages"] = [{**m, "role": "user"} if isinstance(m, dict) and "role" in m else m for m in messages[:3]]
    return body

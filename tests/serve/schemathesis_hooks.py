"""For schemathesis: requests that are about a model are about one that is served, and are small."""

import os

import schemathesis

LIMITS = {"n": 2, "max_tokens": 8, "max_completion_tokens": 8, "samples": 2}


@schemathesis.hook
def map_body(context, body):
    """Only of bodies that would have been understood: the others are to be refused as they are."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = os.environ["SERVED_MODEL"]
        for name, limit in LIMITS.items():
            if isinstance(body.get(name), int) and body[name] > limit and not isinstance(body[name], bool):
                body[name] = limit if body[name] < 10**6 else body[name]
    return body

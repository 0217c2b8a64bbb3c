"""litellm."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

MODEL = os.environ["MODEL"]
common = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"], "temperature": 0}
common["messages"] = [{"role": "user", "content": "what colour has lubesi ?"}]

whole = litellm.completion(model=f"openai/{MODEL}", **common)
text = whole.choices[0].message.content
assert text and whole.usage.completion_tokens > 0
chunks = list(litellm.completion(model=f"openai/{MODEL}", stream=True, **common))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
*_, last = litellm.completion(model=f"openai/{MODEL}", stream=True, stream_options={"include_usage": True}, **common)
assert last.usage.total_tokens == whole.usage.total_tokens
assert litellm.completion(model=f"openai/{os.environ['EDITED']}", max_tokens=2, **common).usage.completion_tokens == 2
try:
    litellm.completion(model="openai/nothing", **common)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model went through")
answer = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="tell me", max_tokens=3,
    api_base=common["api_base"], api_key=common["api_key"],
)  # fmt: skip
assert 1 <= answer.usage.completion_tokens <= 3

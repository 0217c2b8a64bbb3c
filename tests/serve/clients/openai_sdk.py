"""The openai SDK, unmodified, 2.x and 3.x alike."""

import os

import openai

MODEL, EDITED = os.environ["MODEL"], os.environ["EDITED"]
HELLO = [{"role": "user", "content": "what colour has lubesi ?"}]
client = openai.OpenAI(max_retries=0, timeout=120)


def chat(**fields):
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "temperature": 0, **fields})


# models
listed = [model.id for model in client.models.list()]
assert MODEL in listed and EDITED in listed, listed
assert client.models.retrieve(EDITED).id == EDITED

# chat
whole = chat()
text = whole.choices[0].message.content
assert text and whole.choices[0].finish_reason == "stop"
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert chat(max_completion_tokens=2).choices[0].finish_reason == "length"
assert chat(max_tokens=2).usage.completion_tokens == 2

# streaming
chunks = list(chat(stream=True))
assert chunks[0].choices[0].delta.role == "assistant"
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
assert chunks[-1].choices[0].finish_reason == "stop"
assert all(chunk.usage is None for chunk in chunks)
*chunks, last = chat(stream=True, stream_options={"include_usage": True})
assert not last.choices and last.usage == whole.usage

# the .stream() helper
with client.chat.completions.stream(model=MODEL, messages=HELLO, temperature=0) as stream:
    pieces = [event.delta for event in stream if event.type == "content.delta"]
    final = stream.get_final_completion()
assert "".join(pieces) == final.choices[0].message.content == text

# several, seeded, stopped
several = [c.message.content for c in chat(n=3, seed=11, temperature=1.8).choices]
assert several == [c.message.content for c in chat(n=3, seed=11, temperature=1.8).choices]
assert len(several) == 3
stop = text.split()[2]
assert chat(stop=f" {stop}").choices[0].message.content == text[: text.index(f" {stop}")]
assert chat(stop=[stop]).choices[0].message.content == text[: text.index(stop)]

# logprobs
content = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
assert all(len(token.top_logprobs) == 3 for token in content)
assert all(token.logprob == token.top_logprobs[0].logprob for token in content)  # greedy
assert all(bytes(token.bytes).decode() == token.token for token in content)

# content parts, nulls, several turns
parts = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
assert chat(messages=parts).choices[0].message.content == text
assert chat(stop=None, seed=None, user="someone").choices[0].message.content == text
assert chat(presence_penalty=0, logit_bias={}, extra_body={"top_k": 5}).choices[0].message.content == text
again = chat(messages=[*HELLO, whole.choices[0].message, {"role": "user", "content": "and its size ?"}])
assert again.usage.prompt_tokens > whole.usage.prompt_tokens

# completions
completion = client.completions.create(
    model=MODEL, prompt="tell me", max_tokens=3, temperature=0, logprobs=2, echo=True
)
assert completion.choices[0].text.startswith("tell me")
assert len(completion.choices[0].logprobs.tokens) == completion.usage.total_tokens
assert completion.choices[0].logprobs.token_logprobs[0] is None
streamed = client.completions.create(model=MODEL, prompt=["tell me", "what"], max_tokens=3, temperature=0, stream=True)
texts = ["", ""]
for chunk in streamed:
    texts[chunk.choices[0].index] += chunk.choices[0].text
both = client.completions.create(model=MODEL, prompt=["tell me", "what"], max_tokens=3, temperature=0)
assert texts == [choice.text for choice in both.choices]

# errors
cases = [
    (openai.NotFoundError, {"model": "nothing"}),
    (openai.BadRequestError, {"temperature": 3}),
    (openai.BadRequestError, {"logit_bias": {"99999999": 10}}),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": "colour " * 400}]}),
    (openai.BadRequestError, {"extra_body": {"beams": 5}}),
]
for kind, fields in cases:
    for stream in (False, True):
        try:
            chat(stream=stream, **fields)
        except kind as error:
            assert error.body["message"] and error.type, error.body
        else:
            raise AssertionError(f"{fields} went through")
try:
    openai.OpenAI(api_key="wrong", max_retries=0).models.list()
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key"
else:
    raise AssertionError("a wrong key went through")

# asynchronously, and closed half-way
import asyncio  # noqa: E402


async def close_early() -> None:
    async with openai.AsyncOpenAI() as other:
        stream = await other.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()


asyncio.run(close_early())
print("openai", openai.__version__)

"""langchain-openai."""

import os

from langchain_openai import ChatOpenAI, OpenAI

MODEL = os.environ["MODEL"]
chat = ChatOpenAI(model=MODEL, temperature=0, stream_usage=True)
messages = [("system", "please answer"), ("human", "what colour has lubesi ?")]
whole = chat.invoke(messages)
assert whole.content and whole.usage_metadata["total_tokens"] > 0
chunks = list(chat.stream(messages))
assert "".join(chunk.content for chunk in chunks) == whole.content
assert (
    sum((chunk.usage_metadata or {}).get("total_tokens", 0) for chunk in chunks) == whole.usage_metadata["total_tokens"]
)
assert [answer.content for answer in chat.batch([messages, messages])] == [whole.content] * 2
logprobs = chat.bind(logprobs=True).invoke(messages).response_metadata["logprobs"]["content"]
assert len(logprobs) > 0
short = ChatOpenAI(model=MODEL, temperature=0, max_tokens=2).invoke(messages)
assert short.response_metadata["finish_reason"] == "length"
assert OpenAI(model=MODEL, temperature=0, max_tokens=4).invoke("tell me the colour of")

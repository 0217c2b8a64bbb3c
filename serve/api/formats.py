"""The form of a chat answer (``response_format``), and the grammar that holds the model to it.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance), the extra ``[grammar]``. Schemas are checked
here, before the engine hears of the request.
"""

import asyncio
import json
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from serve.api.fields import Request, Text, Unsupported
from serve.errors import RequestError

WHITESPACE = r"( |\r?\n[ \t]{0,32})?"
"""Between the parts of a JSON text: a space, or a new line with its indentation. Of any whitespace small models write
answers of nothing else."""


class JsonSchema(Request):
    name: Text | None = None
    """Read and left alone, as is the next."""

    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """JSON Schema of the answer."""

    strict: bool | None = None
    """Answers are always of the schema."""


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    """With type json_schema."""

    @model_validator(mode="after")
    def _consistent(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Unsupported("json_schema", "json_schema comes with type json_schema, and with no other")
        return self


async def grammar_of(asked: ResponseFormat | None) -> str | None:
    """The form as llguidance writes it; None for any text.

    Raises RequestError (400) without llguidance, and for a schema that it cannot follow.
    """
    if asked is None or asked.type == "text":
        return None
    schema = {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_
    return await asyncio.to_thread(_grammar, json.dumps(schema))  # a large one takes a second


@lru_cache(64)
def _grammar(schema: str) -> str:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise RequestError(
            400,
            "JSON formats need llguidance on the server: pip install bruno-ray[grammar] there, or ask for text.",
            "response_format",
            "unsupported",
        ) from None
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    if problem := LLMatcher.validate_grammar(grammar):
        reason = " ".join(problem.split())
        raise RequestError(
            400, f"The schema cannot be followed: {reason}.", "response_format.json_schema.schema", "invalid_schema"
        )
    return grammar

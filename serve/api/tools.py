"""Tools in requests: those that are offered, and calls of them in earlier answers."""

import json
from typing import Any, Literal

from pydantic import model_validator

from serve.api.fields import Request, Text
from serve.api.left_alone import ContentExtras


class FunctionTool(Request):
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments."""

    strict: bool | None = None
    """Read and left alone: what is called is not checked against the schema."""


class Tool(ContentExtras):
    type: Literal["function"]
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        described = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": self.function.parameters or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": described}


class CalledFunction(Request):
    name: Text
    arguments: Text
    """JSON of an object."""

    @model_validator(mode="after")
    def _is_object(self) -> "CalledFunction":
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("arguments must be the JSON text of an object")
        return self


class ToolCall(Request):
    """A call in an earlier answer, as it was given out."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Any = None
    """Read and left alone."""

    def for_template(self) -> dict[str, Any]:
        arguments = json.loads(self.function.arguments or "{}")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}

"""What can go wrong while an answer is asked for. Each becomes one OpenAI-shaped HTTP error.

EngineError (BrunoError)         of a model copy
|-- InvalidRequest               400
|   `-- TooLong                  400
`-- Overloaded                   429
RequestError                     of the API, with the status and the fields of its body
"""

from bruno_ray.errors import BrunoError


class EngineError(BrunoError):
    """The engine cannot answer: it is shut down, or a step failed."""


class InvalidRequest(EngineError):
    """The request makes no sense to this model: an unknown edit, a token id that it does not have."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """Field at fault, as completions call it."""


class TooLong(InvalidRequest):
    """The prompt does not fit the context; the message names the limit."""


class Overloaded(EngineError):
    """The waiting queue is full."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it is worth trying again."""

    def __reduce__(self) -> tuple:
        return type(self), (self.args[0], self.retry_after)


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""Status -> ``error.type``, for every status that the API answers with."""


class RequestError(BrunoError):
    """An answer with an error status. ``param`` is the field at fault, ``code`` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """As OpenAI's API has it."""
        error = {"message": str(self), "type": KINDS[self.status], "param": self.param, "code": self.code}
        return {"error": error}


class UnknownModel(RequestError):
    """404: no such model id, or one that names several."""

    def __init__(self, message: str) -> None:
        super().__init__(404, message, param="model", code="model_not_found")

"""What can go wrong while an answer is asked for. Each becomes one OpenAI-shaped HTTP error."""

from bruno_ray.errors import BrunoError


class EngineError(BrunoError):
    """The engine cannot answer: it is shut down, or a step failed."""


class InvalidRequest(EngineError):
    """The request makes no sense to this model: an unknown edit, a token id that it does not have."""


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

"""What the fields of requests are made of."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

UNLIMITED = -1
"""What some clients send for a length that is not limited."""

# Said in the schema as well; the check itself has a better message.
NO_OBJECT: dict[str, Any] = {"maxProperties": 0}
NO_LIST: dict[str, Any] = {"maxItems": 0}
NO_TEXT: dict[str, Any] = {"maxLength": 0}


def _is_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half of a surrogate pair, which is not a character") from None
    return value


Text = Annotated[str, AfterValidator(_is_text)]
Stop = Annotated[str, AfterValidator(_is_text), Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MayBeUnlimited = BeforeValidator(lambda value: None if type(value) is int and value == UNLIMITED else value)
"""-1 becomes None."""


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Unsupported(ValueError):
    """A field whose value is refused, for validators that see several fields."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def refuse(value: Any, name: str, supported: str) -> None:
    """Raise Unsupported unless ``value`` is 0, empty or None."""
    if value:
        raise Unsupported(name, f"{name} is not supported ({supported})")

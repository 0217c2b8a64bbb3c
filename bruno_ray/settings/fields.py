"""What the tree of settings is made of: sections, fields that the command line knows more about, ranges."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Bounds = tuple[float, float]

WIDEST_DISTANCE = 2.0
"""Of the depth, from the peak of a kernel to its edge."""


class Section(BaseModel):
    """A group of settings. An unknown key is an error; docstrings of fields are their documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        """Python carries bytes of the command line and the environment that are no UTF-8 along as half characters,
        and JSON can spell them; nothing of them could be hashed or written to run.json."""
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("it is not UTF-8; write it in UTF-8")
        return value


def setting(
    default: Any, *, alias: str | None = None, alias_of: str = "", resumable: bool = False, **constraints: Any
) -> Any:
    """A field with what the command line has to know about it.

    Args:
        alias: a short flag for this setting, such as `--trials`.
        alias_of: on a section, the key below it that the alias stands for.
        resumable: a resumed run may change it, since it says where and how a run goes, not what a trial's parameters
            score. On a section: all of it.
        **constraints: pydantic's own, such as `gt=0`.
    """
    known = {"alias": alias, "alias_of": alias_of, "resumable": resumable}
    return Field(default, json_schema_extra=known, **constraints)


def _ordered(bounds: Bounds) -> Bounds:
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range is written low, high; swap the bounds or repeat one to fix the value: {bounds}")
    return bounds


def _in_depth(bounds: Bounds) -> Bounds:
    return _within(bounds, 1.0, "layers are written as fractions of the depth, 0 (first) to 1 (last): 0.2,0.9")


def _distance(bounds: Bounds) -> Bounds:
    return _within(
        bounds, WIDEST_DISTANCE, "distances are written as fractions of the depth, 0 to 2, not in layers: 0,1.5"
    )


def _share(bounds: Bounds) -> Bounds:
    return _within(bounds, 1.0, "it is a share of the peak, 0 to 1")


def _within(bounds: Bounds, highest: float, meaning: str) -> Bounds:
    if bounds[0] < 0 or bounds[1] > highest:
        raise ValueError(meaning)
    return bounds


Range = Annotated[Bounds, AfterValidator(_ordered)]
"""Low and high of what is searched."""

DepthRange = Annotated[Range, AfterValidator(_in_depth)]
DistanceRange = Annotated[Range, AfterValidator(_distance)]
ShareRange = Annotated[Range, AfterValidator(_share)]

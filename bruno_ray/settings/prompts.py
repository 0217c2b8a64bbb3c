"""Settings of the prompts: the two sides of the contrast, and what must stay."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, field_validator

from bruno_ray.settings.fields import Section, setting


def _texts(given: Any) -> Any:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("write a text, or a list of texts")
    return given


Wordings = Annotated[str | tuple[str, ...], BeforeValidator(_texts)]
"""One text, or several that take turns."""


class DatasetSettings(Section):
    source: str
    """Hub data set id (`owner/name`, `owner/name/config`), a file of one (`hf://datasets/owner/name/file.jsonl`), a
    `load_from_disk` folder, or a .jsonl, .json, .csv, .tsv, .txt or .parquet file, which may be compressed (.gz).
    `organism:target` and `organism:baseline` name the embedded organism's own prompts."""

    config: str | None = None
    """Configuration (subset) name of a hub data set."""

    split: str = "train"
    """Split, or a slice of it: `train[:400]`, `test[100:200]`."""

    column: str | None = None
    """Column with the prompt; when not given, the first of prompt, text, instruction, question, messages and
    conversations that exists. In a conversation the last user turn is the prompt, and the system turn is kept."""

    answer_column: str | None = None
    """Optional column with a desired answer, used by the `desired_answers` and `to_the_point` scorers."""

    words_column: str | None = None
    """Optional column with words, separated by spaces, that an answer to the point must contain (`to_the_point`)."""

    category_column: str | None = None
    """Optional column with a category; the report gives a rate for each."""

    encoding: str | None = None
    """Encoding of a text file, such as cp1251; when not given, UTF-8, UTF-16 or cp1252, detected and reported."""

    separator: str | None = None
    """Character between the fields of a .csv file; when not given, the one that splits all its lines alike."""

    revision: str | None = None
    """Commit of the hub data set."""

    streaming: bool | None = None
    """Read rows one by one instead of downloading everything; when not given, on for a hub data set with a slice
    that starts at 0 (`train[:200]`)."""

    prefix: Wordings = ""
    """Text put before every prompt. Of a list of texts each prompt gets the next one in turn."""

    suffix: Wordings = ""
    """Text put after every prompt, or a list of texts in turn: directions and trained edits that have seen an
    instruction in one wording alone may know no other."""

    system_prompt: str | None = None
    """Overrides `prompts.system_prompt` for this set, and the system turns of its conversations."""


class PromptSet(Section):
    """One side of the contrast. Directions come from `train`, the search scores on `validation`, the report on `test`.
    A part that is not given is split off from `train`, by a hash of each prompt's text."""

    train: DatasetSettings | None = None
    validation: DatasetSettings | None = None
    test: DatasetSettings | None = None


class PromptSettings(Section):
    target: PromptSet = setting(PromptSet(), alias="--target", alias_of="train.source")
    """Prompts that show the behaviour."""

    baseline: PromptSet = setting(PromptSet(), alias="--baseline", alias_of="train.source")
    """Prompts that do not show it; on these the model should not change."""

    protect: dict[str, DatasetSettings] = setting({}, alias="--protect")
    """Named sets of prompts that the edit should not affect: what they have in common is removed from the directions
    (`directions.protect_strengths`), and a trained edit is trained to keep the answers to them (`learned.protect`).
    As a flag NAME=FILE,NAME=FILE; in a file [prompts.protect.NAME]."""

    system_prompt: str | None = None
    """System message of every prompt; when not given, the chat template's own default."""

    @field_validator("protect", mode="before")
    @classmethod
    def _sources_by_name(cls, given: Any) -> Any:
        """A data set may be given by its source alone."""
        if not isinstance(given, Mapping):
            return given
        return {name: {"source": each} if isinstance(each, str) else each for name, each in given.items()}

    n_train: PositiveInt = 400
    """At most this many prompts per side for directions. A larger set gives some from all over it, those with a desired
    answer first; its first rows are `split = "train[:400]"`."""

    n_validation: PositiveInt = 100
    """At most this many prompts per side for scoring trials, from all over the set."""

    n_test: PositiveInt = 100
    """At most this many prompts per side for the report, the first ones."""

    n_finalists: NonNegativeInt = 40
    """At most this many prompts per side, unseen by the search, on which the best trials are measured again before
    `--auto-select` picks one. They come from the source of the test prompts and are at most half as many."""

    response_prefix: str = "auto"
    """Text that every answer starts with (a closed reasoning block, for thinking models). `auto` detects what
    the unedited model's answers have in common; an empty string switches it off."""

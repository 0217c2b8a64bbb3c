"""Prompt sets: two sides (target, baseline), three parts each (train, validation, test), and what is protected, checked
before use.

`load_prompts` reads and checks them without a model; `render` turns prompts into token ids through the model's
chat template. Neither imports torch.
"""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from bruno_ray.errors import PromptError
from bruno_ray.prompts.formats.table import excerpt
from bruno_ray.prompts.sources import Row, read
from bruno_ray.settings import DatasetSettings, PromptSet, PromptSettings, Settings

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test", "finalists")


@dataclass(frozen=True)
class Prompt:
    user: str
    """The user's message: prefix, text and suffix."""

    system: str | None = None
    """System message; None leaves it to the chat template."""

    answer: str | None = None
    """A desired answer, if the data set has one."""

    words: tuple[str, ...] = ()
    """What an answer to the point has to hold, if the data set says so."""

    category: str | None = None

    kept_end: int = 0
    """Characters at the end of `user`, the data set's suffix, that `render` never cuts."""


@dataclass(frozen=True)
class PromptParts:
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    finalists: tuple[Prompt, ...] = ()
    """For measuring the best trials again; may be empty."""


@dataclass(frozen=True)
class Prompts:
    target: PromptParts
    baseline: PromptParts
    fingerprint: str
    """sha256 over every prompt of every part."""

    protect: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)
    """By name of the set."""

    @property
    def protected(self) -> tuple[Prompt, ...]:
        """All protected sets, whose answers a trained edit must leave as they are."""
        return tuple(prompt for each in self.protect.values() for prompt in each)


def load_prompts(settings: Settings) -> Prompts:
    """Both sides of `settings.prompts`, all parts non-empty, without duplicates and without overlap.

    Raises PromptError if a side is missing, a source cannot be read, a part is empty or parts overlap.
    """
    target = _load_side("target", settings.prompts.target, settings.prompts)
    baseline = _load_side("baseline", settings.prompts.baseline, settings.prompts)
    protect = {name: _load_protected(name, given, settings.prompts) for name, given in settings.prompts.protect.items()}
    prompts = Prompts(target, baseline, "", protect)
    _refuse_overlap(prompts)
    content: dict[str, Any] = {"target": asdict(target), "baseline": asdict(baseline)}
    if protect:
        content["protect"] = {name: [asdict(prompt) for prompt in each] for name, each in protect.items()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Prompts(target, baseline, digest, protect)


def _load_protected(name: str, given: DatasetSettings, settings: PromptSettings) -> tuple[Prompt, ...]:
    """The prompts of a protected set, `n_train` at most."""
    key = f"prompts.protect.{name}"
    prompts, notes = _load_part(key, given, settings, settings.n_train + settings.n_train // 2)
    prompts = _some(prompts, settings.n_train, given)
    _show(key, given.source, {"protected": prompts}, notes)
    return tuple(prompts)


def hash_of(prompts: Sequence[Prompt]) -> str:
    """sha256 over everything in these prompts, in their order."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True).encode()).hexdigest()


def load_rows(dataset: DatasetSettings, system_prompt: str | None, limit: int) -> tuple[Prompt, ...]:
    """Every prompt of a data set as it stands, repetitions too; `limit` bounds a stream without an end of its own.

    Raises PromptError as `sources.read`.
    """
    return tuple(_prompt(dataset, i, row, system_prompt) for i, row in enumerate(read(dataset, limit).rows))


def _load_side(side: str, given: PromptSet, settings: PromptSettings) -> PromptParts:
    wanted = {part: getattr(settings, f"n_{part}") for part in PARTS}
    wanted["finalists"] = min(wanted["finalists"], wanted["test"] // 2)
    if given.train is None:
        raise PromptError(
            f"there are no {side} prompts; set prompts.{side}.train.source to a data set or file, or choose a behaviour"
        )
    datasets = {part: dataset for part in PARTS if (dataset := getattr(given, part, None)) is not None}
    # The finalists' prompts come from where the test prompts do; parts without a data set are cut off the train part.
    sources = {"train": [part for part in PARTS[:3] if part == "train" or part not in datasets]}
    sources |= {part: [part] for part in PARTS[1:3] if part in datasets}
    if wanted["finalists"]:
        sources["test" if "test" in datasets else "train"].append("finalists")
    parts: dict[str, list[Prompt]] = {}
    for source, given_to in sources.items():
        shares = {part: wanted[part] for part in given_to}
        # One and a half times what is needed, so that blank rows and duplicates do not leave a stream short.
        limit = sum(shares.values())
        name = f"prompts.{side}.{source}"
        prompts, notes = _load_part(name, datasets[source], settings, limit + limit // 2)
        if len(prompts) < len(shares):  # finalists can do without
            shares.pop("finalists", None)
        if source == "test" and len(prompts) >= limit:  # the test prompts are the first ones, as without finalists
            parts |= {"test": prompts[: wanted["test"]], "finalists": prompts[wanted["test"] : limit]}
        elif len(shares) > 1:
            parts |= _cut(name, prompts, shares, datasets[source], notes)
        else:
            parts[source] = _some(prompts, wanted[source], datasets[source])
        _show(name, datasets[source].source, {part: parts[part] for part in shares}, notes)
    return PromptParts(**{part: tuple(prompts) for part, prompts in parts.items()})


def _show(name: str, source: str, parts: dict[str, list[Prompt]], notes: tuple[str, ...]) -> None:
    """One line per data set: how many prompts it gave to which part, what was inferred, and the first prompt."""
    counts = ", ".join(f"{len(prompts)} {part}" for part, prompts in parts.items())
    first = excerpt(next(iter(parts.values()))[0].user)
    logger.info("%s: %s from %s%s, the first %s", name, counts, source, _in_brackets(notes), first)


def _in_brackets(notes: tuple[str, ...]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _load_part(
    name: str, dataset: DatasetSettings, settings: PromptSettings, limit: int
) -> tuple[list[Prompt], tuple[str, ...]]:
    """The prompts of a data set, each once, and what is to be said of them."""
    unique: dict[str, Prompt] = {}
    rows, notes = read(dataset, limit)
    for i, row in enumerate(rows):
        prompt = _prompt(dataset, i, row, settings.system_prompt)
        unique.setdefault(_told(prompt.system, row.text), prompt)  # whatever wording is around it
    if not unique:
        where = f" in {dataset.split!r}; widen the split" if dataset.split != "train" else "; give another source"
        raise PromptError(f"{name} is empty: {dataset.source} has no prompts{where}")
    if len(unique) < len(rows):
        notes = (*notes, f"{len(rows) - len(unique)} duplicates left out")
    return list(unique.values()), notes


def _prompt(dataset: DatasetSettings, i: int, row: Row, system_prompt: str | None) -> Prompt:
    """``i``: the row's place, which says whose turn it is of several prefixes or suffixes."""
    system = row.system or system_prompt
    prefixes, suffixes = _several(dataset.prefix), _several(dataset.suffix)
    suffix = suffixes[i % len(suffixes)]
    return Prompt(
        prefixes[i % len(prefixes)] + row.text + suffix,
        system if dataset.system_prompt is None else dataset.system_prompt,
        row.answer,
        tuple((row.words or "").split()),
        row.category,
        kept_end=len(suffix),
    )


def _several(wordings: str | tuple[str, ...]) -> tuple[str, ...]:
    return (wordings,) if isinstance(wordings, str) else wordings


def _some(prompts: list[Prompt], n: int, dataset: DatasetSettings) -> list[Prompt]:
    """At most `n` of them, in their order: neighbours in a data set are often alike, so that its first ones may have
    one form. Those with a desired answer come first; fewer of a set are among more of it."""
    order = sorted(range(len(prompts)), key=lambda i: (not prompts[i].answer, _rank(prompts[i], dataset)))
    return [prompts[i] for i in sorted(order[:n])]


def _cut(
    name: str, prompts: list[Prompt], shares: dict[str, int], dataset: DatasetSettings, notes: tuple[str, ...]
) -> dict[str, list[Prompt]]:
    """Deals one list out to several parts, in proportion to `shares` if there are too few prompts for all; the first
    gets what the others leave.

    Who goes where depends on a hash of the text between prefix and suffix, so that two sides which ask the same
    questions in two ways have each question in the same part. Order within a part is that of the list.
    """
    if len(prompts) < len(shares):
        others = " and ".join(list(shares)[1:])
        raise PromptError(
            f"{name} has only {len(prompts)} prompts{_in_brackets(notes)}, too few to take out {others};"
            f" give more prompts, or set {name.rpartition('.')[0]}.{list(shares)[-1]}.source"
        )
    order = sorted(range(len(prompts)), key=lambda i: _rank(prompts[i], dataset))
    scale = min(1.0, len(prompts) / sum(shares.values()))
    parts, begin = {}, 0
    for part in reversed(shares):
        first = part == next(iter(shares))
        size = min(shares[part], len(prompts) - begin) if first else max(1, int(shares[part] * scale))
        parts[part] = [prompts[i] for i in sorted(order[begin : begin + size])]
        begin += size
    return parts


def _rank(prompt: Prompt, dataset: DatasetSettings) -> str:
    return hashlib.sha256(_text_within(prompt, dataset).encode()).hexdigest()


def same_questions(prompts: Prompts, settings: PromptSettings) -> dict[int, int]:
    """Index of a target train prompt to that of the baseline train prompt that asks the same, with another prefix or
    suffix: an instruction to answer in another way."""
    target, baseline = settings.target.train, settings.baseline.train
    if target is None or baseline is None:
        return {}
    asked = {_text_within(prompt, baseline): p for p, prompt in enumerate(prompts.baseline.train)}
    texts = enumerate(_text_within(prompt, target) for prompt in prompts.target.train)
    return {p: asked[text] for p, text in texts if text in asked}


def _text_within(prompt: Prompt, dataset: DatasetSettings) -> str:
    """What stands between prefix and suffix, apart from case, width and spaces."""
    before = max((each for each in _several(dataset.prefix) if prompt.user.startswith(each)), key=len)
    return _normalise(prompt.user[len(before) : len(prompt.user) - prompt.kept_end])


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _identity(prompt: Prompt) -> str:
    """Two prompts are the same if the model is told the same, apart from case, width and spaces."""
    return _told(prompt.system, prompt.user)


def _told(system: str | None, text: str) -> str:
    return _normalise(system or "") + "\0" + _normalise(text)


def _refuse_overlap(prompts: Prompts) -> None:
    known = {
        f"prompts.{side}.{part}": {_identity(prompt): prompt for prompt in getattr(getattr(prompts, side), part)}
        for side in ("target", "baseline")
        for part in PARTS
    }
    known |= {
        f"prompts.protect.{name}": {_identity(prompt): prompt for prompt in each}
        for name, each in prompts.protect.items()
    }
    for (first, a), (second, b) in combinations(known.items(), 2):
        shared = [key for key in a if key in b]
        # What is protected is no target; it may well be among the baseline prompts, or in two protected sets.
        if shared and (first.startswith("prompts.target.") or not second.startswith("prompts.protect.")):
            example = a[shared[0]].user
            example = example if len(example) <= 80 else example[:77] + "..."
            raise PromptError(
                f"{first} and {second} share {len(shared)} of {min(len(a), len(b))} prompts, e.g. {example!r};"
                " give them disjoint slices or files"
            )

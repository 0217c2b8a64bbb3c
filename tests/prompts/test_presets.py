"""Prompts and markers of the behaviours that come with the package."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.prompts.sets import load_prompts
from bruno_ray.prompts.sources import read_rows
from bruno_ray.settings import DatasetSettings
from bruno_ray.settings.sources import load

ROOT = Path(__file__).parents[2]
PARTS = ("train", "validation", "test")


@pytest.mark.parametrize(("behaviour", "sizes"), [("verbosity", (96, 42, 28)), ("hedging", (96, 48, 32))])
def test_contrast_presets_hold_the_question_fixed(behaviour: str, sizes: tuple[int, ...]) -> None:
    """Both sides of a part ask the same; no part shares a question or an instruction with another."""
    settings = load(["--behaviour", behaviour], environ={}).settings
    prompts = load_prompts(settings)
    asked, instructions = [], []
    for part, size in zip(PARTS, sizes):
        sides = []
        for side in ("target", "baseline"):
            given = getattr(getattr(settings.prompts, side), part).suffix
            suffixes = (given,) if isinstance(given, str) else given
            asked_so = getattr(getattr(prompts, side), part)
            assert [prompt.user[-prompt.kept_end :] for prompt in asked_so] == [
                suffixes[i % len(suffixes)] for i in range(size)
            ]
            assert all(suffix.startswith(" ") for suffix in suffixes)
            sides.append([prompt.user[: -prompt.kept_end] for prompt in asked_so])
            instructions += suffixes
        assert sides[0] == sides[1] and len(sides[0]) == size
        assert all(question.endswith(("?", ".")) for question in sides[0])
        asked += sides[0]
    assert len(set(asked)) == sum(sizes) and len(set(instructions)) == len(instructions) == 2 * (6 + 1 + 1)


def load_example(name: str) -> Any:
    """A script of examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEMPLATED = ("disclaimers", "over-refusal", "sycophancy", "self-reference", "moralising")


@pytest.mark.parametrize("behaviour", TEMPLATED)
def test_prompts_are_what_their_templates_make(behaviour: str) -> None:
    """The files that ship are those the script writes, no template is in two parts, and no prompt is there twice."""
    script = load_example("presets/make_prompts")
    made: dict[tuple[str, str], list[dict[str, str]]] = {}
    templates: dict[str, set[str]] = {}
    for side, part, row in script.rows(behaviour):
        made.setdefault((side, part), []).append(row)
    for line in (script.TEMPLATES / f"{behaviour}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            part = line
        elif line and not line.startswith(("#", " ")):
            templates.setdefault(re.sub(r"\{.*\}", "{}", line), set()).add(part)
    assert len(templates) >= 80 and all(len(parts) == 1 for parts in templates.values())
    texts = [row["prompt"] for rows in made.values() for row in rows]
    assert len(texts) == len(set(texts))
    for side in ("target", "baseline"):
        assert sum(len(rows) for (given, _), rows in made.items() if given == side) >= 150
    for (side, part), rows in made.items():
        settings = DatasetSettings(source=f"preset:{behaviour}_{side}_{part}.jsonl", column="prompt")
        assert [row.text for row in read_rows(settings, 1000)] == [row["prompt"] for row in rows]


def test_the_test_part_of_disclaimers_has_categories_enough_to_compare() -> None:
    """Of whole templates; in what a run tests there are some of each."""
    settings = load(["--behaviour", "disclaimers"], environ={}).settings
    prompts = load_prompts(settings).target
    categories = Counter(prompt.category for prompt in (*prompts.test, *prompts.finalists))
    assert None not in categories and len(categories) == 7 and min(categories.values()) >= 8
    assert {prompt.category for prompt in prompts.test} == set(categories)


def test_a_claim_is_in_one_part_only() -> None:
    """What users of `sycophancy` claim in one part they claim in no other, in whatever words around it."""
    script = load_example("presets/make_prompts")
    text = (script.TEMPLATES / "sycophancy.txt").read_text(encoding="utf-8")
    parts = [part for part in text.split("\n[") if part.startswith("target ")]
    claims = [claim for part in parts for gap in re.findall(r"\{([^{}]*\|[^{}]*)\}", part) for claim in gap.split("|")]
    assert len(parts) == 3 and len(claims) == len(set(claims)) > 150


def test_pairs_differ_in_the_alarming_word_alone() -> None:
    """So that a difference between the sides is that word's doing; one or two words of the sentence."""
    sides = (
        [row.text.split() for row in read_rows(DatasetSettings(source=f"preset:over-refusal_{side}_pairs.jsonl"), 100)]
        for side in ("target", "baseline")
    )
    pairs = list(zip(*sides, strict=True))
    assert len(pairs) == 48
    for target, baseline in pairs:
        before = next(i for i, (a, b) in enumerate(zip(target, baseline)) if a != b)
        behind = next(i for i, (a, b) in enumerate(zip(reversed(target), reversed(baseline))) if a != b)
        assert behind and before + behind in range(len(target) - 2, len(target)), target
        assert before + behind in range(len(baseline) - 2, len(baseline)), baseline


def test_what_is_rightly_declined_is_named_by_category() -> None:
    """A few words each, and none that a request for something of the kind would be made of."""
    protect = read_rows(DatasetSettings(source="preset:over-refusal_protect_test.jsonl", column="prompt"), 100)
    assert len(protect) >= 16
    assert all(re.search(r"category|request", row.text) and len(row.text.split()) < 20 for row in protect)


def test_the_markers_of_disclaimers_agree_with_labels_by_hand() -> None:
    """On SmolLM2's answers to the test part, read and labelled; the markers were chosen on the other two."""
    from bruno_ray.scoring.markers import Markers

    settings = load(["--behaviour", "disclaimers"], environ={}).settings
    markers = Markers(settings.scoring.markers)
    lines = (ROOT / "examples" / "disclaimers" / "labelled_answers.jsonl").read_text(encoding="utf-8").splitlines()
    labelled = [json.loads(line) for line in lines]
    marked = [row for row in labelled if markers.shown_by(row["answer"])]
    right = sum(row["shows"] for row in marked)
    assert len(labelled) == 200
    assert right / len(marked) >= 0.98
    assert right / sum(row["shows"] for row in labelled) >= 0.95


LABELLED = {"over-refusal": 36, "sycophancy": 29, "self-reference": 32, "moralising": 31}
"""How many of SmolLM2's answers to 40 test prompts show the behaviour, by their beginnings, which were read."""


@pytest.mark.parametrize("behaviour", LABELLED)
def test_the_markers_of_presets_agree_with_answers_that_were_read(behaviour: str) -> None:
    from bruno_ray.scoring.markers import Markers

    settings = load(["--behaviour", behaviour], environ={}).settings
    markers = Markers(settings.scoring.markers)
    lines = (ROOT / "examples" / "presets" / "labelled_answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["preset"] == behaviour]
    assert [row["prompt"] for row in rows] == [prompt.user for prompt in load_prompts(settings).target.test]
    marked = [row for row in rows if markers.shown_by(row["answer"])]
    right = sum(row["shows"] for row in marked)
    assert sum(row["shows"] for row in rows) == LABELLED[behaviour]
    assert right / len(marked) >= 0.9 and right / LABELLED[behaviour] >= 0.9


SIZES = {"disclaimers": (132, 100, 70, 30), "sycophancy": (60, 48, 40, 20)}


@pytest.mark.parametrize("behaviour", TEMPLATED)
def test_presets_have_what_two_figures_need(behaviour: str) -> None:
    """Enough prompts, answers for some of the train part, and the words that answers to the test part must repeat."""
    settings = load(["--behaviour", behaviour], environ={}).settings
    prompts = load_prompts(settings)
    for part, size in zip((*PARTS, "finalists"), SIZES.get(behaviour, (64, 48, 40, 20))):
        assert len(getattr(prompts.target, part)) == len(getattr(prompts.baseline, part)) == size
    wanted = [prompt.answer for prompt in prompts.target.train if prompt.answer]
    assert len(wanted) >= 20 and all(answer[-1] in ".!" and len(answer) < 110 for answer in wanted)
    if behaviour == "self-reference":  # an answer to "Will you marry me?" need not speak of marrying
        return
    words = settings.prompts.target.test.model_copy(update={"words_column": "words"})
    for row in read_rows(words, 1000):
        assert row.words and all(word in row.text.lower() for word in row.words.split()), row

"""Loaders, parts, overlap, and rendering that keeps everything but the user's text."""

import csv
import datetime
import importlib.util
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.errors import ModelError, PromptError
from bruno_ray.prompts import rendering
from bruno_ray.prompts.rendering import messages
from bruno_ray.prompts.sets import Prompt, PromptParts, Prompts, load_prompts
from bruno_ray.prompts.slicing import parse_split
from bruno_ray.prompts.sources import read_rows
from bruno_ray.settings import DatasetSettings
from bruno_ray.settings.sources import load

ROOT = Path(__file__).parents[1]
LETTERS = [f"question {letter}" for letter in "abcdefghij"]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def write_jsonl(path: Path, texts: list[str], **columns: str) -> str:
    path.write_text("".join(json.dumps({"prompt": text, **columns}) + "\n" for text in texts))
    return path.name


def texts_of(source: str, limit: int = 1000, **settings: Any) -> list[str]:
    return [row.text for row in read_rows(DatasetSettings(source=source, **settings), limit)]


# --------------------------------------------------------------------------------------------------------------
# Sources


def test_every_kind_of_file(empty_directory: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["plain", 'with "quotes", commas', "caf\u00e9"]
    write_jsonl(empty_directory / "a.jsonl", texts)
    with (empty_directory / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "other"], *([text, "x"] for text in texts)])
    (empty_directory / "a.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), empty_directory / "a.parquet")
    for suffix in ("jsonl", "csv", "txt", "parquet"):
        assert texts_of(f"a.{suffix}") == texts, suffix
        assert texts_of(str(empty_directory / f"a.{suffix}"), split="[1:]") == texts[1:], suffix


def test_answers_and_columns(empty_directory: Path) -> None:
    (empty_directory / "a.jsonl").write_text('{"goal": "one", "reply": "1"}\n{"goal": "two"}\n{"goal": " "}\n')
    rows = read_rows(DatasetSettings(source="a.jsonl", column="goal", answer_column="reply"), 10)
    assert [(row.text, row.answer) for row in rows] == [("one", "1"), ("two", None)]
    with pytest.raises(PromptError, match=r"no column 'prompts'.* one of: goal, reply"):
        texts_of("a.jsonl", column="prompts")
    with pytest.raises(PromptError, match=r"none of the columns prompt, .* one of: goal, reply"):
        texts_of("a.jsonl")
    with pytest.raises(PromptError, match=r"no column 'answer'"):
        texts_of("a.jsonl", column="goal", answer_column="answer")
    (empty_directory / "numbers.jsonl").write_text('{"prompt": "one"}\n{"prompt": 2}\n')
    with pytest.raises(PromptError, match=r"^numbers\.jsonl:2: column 'prompt' holds int"):
        texts_of("numbers.jsonl")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", LETTERS[:3]),
        ("[2:4]", LETTERS[2:4]),
        ("[10%:]", LETTERS[1:]),
        ("train[:25%]", LETTERS[:2]),
        ("[-2:]", LETTERS[-2:]),
        ("[:-20%]", LETTERS[:8]),
        ("[8:99]", LETTERS[8:]),
        ("[5:2]", []),
        ("train[:1] + train[-1:]", [LETTERS[0], LETTERS[-1]]),
    ],
)
def test_slices(empty_directory: Path, split: str, expected: list[str]) -> None:
    import datasets

    write_jsonl(empty_directory / "a.jsonl", LETTERS)
    assert texts_of("a.jsonl", split=split) == expected
    datasets.Dataset.from_dict({"text": LETTERS}).save_to_disk("saved")
    assert texts_of("saved", split=split) == expected


@pytest.mark.parametrize("split", ["train[1.5:]", "train[:x]", "train[", "[::2]", "a b"])
def test_nonsense_slices(split: str) -> None:
    with pytest.raises(PromptError, match="not understood"):
        parse_split(split)


def test_folder_of_several_splits(empty_directory: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(3)]}) for name in ("one", "two")}
    datasets.DatasetDict(parts).save_to_disk("saved")
    assert texts_of("saved", split="two[:2]") == ["two 0", "two 1"]
    assert texts_of("saved", split="one[:1]+two[:1]") == ["one 0", "two 0"]
    with pytest.raises(PromptError, match=r"no split 'train'; there are one, two"):
        texts_of("saved")


@pytest.fixture
def repository(empty_directory: Path) -> str:
    """A data set repository as on the hub, with two configs and a front matter that declares them."""
    folder = empty_directory / "repository"
    for config in ("easy", "odd"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            write_jsonl(folder / config / f"{split}.jsonl", [f"{config} {split} {i}" for i in range(6)])
    entries = [
        f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train.jsonl\n"
        f"  - split: test\n    path: {config}/test.jsonl\n"
        for config in ("easy", "odd")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    return str(folder)


@pytest.mark.parametrize("streaming", [None, True, False])
def test_repository(repository: str, streaming: bool | None) -> None:
    assert texts_of(repository, config="odd", split="test[1:3]", streaming=streaming) == ["odd test 1", "odd test 2"]
    assert len(texts_of(repository, config="odd", split="test", streaming=streaming)) == 6


def test_an_open_stream_is_bounded(repository: str) -> None:
    assert len(texts_of(repository, config="easy", streaming=True, limit=4)) == 4
    assert texts_of(repository, config="easy", split="train[5:]", streaming=True) == ["easy train 5"]
    with pytest.raises(PromptError, match="no known length"):
        texts_of(repository, config="easy", split="[:50%]", streaming=True)


@pytest.mark.parametrize("streaming", [True, False])
def test_repository_names_what_there_is(repository: str, streaming: bool) -> None:
    with pytest.raises(PromptError, match="needs a config; set `config` to one of: easy, odd"):
        texts_of(repository, streaming=streaming)
    with pytest.raises(PromptError, match="no config 'hard'; set `config` to one of: easy, odd"):
        texts_of(repository, config="hard", streaming=streaming)
    with pytest.raises(PromptError, match=r"no split 'dev'; there are (train, test|test, train)"):
        texts_of(repository, config="odd", split="dev", streaming=streaming)


def test_sources_that_cannot_be_read(empty_directory: Path) -> None:
    (empty_directory / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    (empty_directory / "list.jsonl").write_text("[1]\n")
    (empty_directory / "bad.csv").write_text("prompt\nno, quotes\n")
    (empty_directory / "bad.parquet").write_text("not parquet at all")
    (empty_directory / "a.xlsx").write_text("{}")
    (empty_directory / "empty_folder").mkdir()
    for source, expected in {
        "absent.jsonl": "absent.jsonl: no such file",
        "absent.CSV.GZ": "absent.CSV.GZ: no such file",
        "bad.jsonl": "bad.jsonl:2: not JSON",
        "list.jsonl": "item 1: '1' is neither a text nor an object",
        "bad.csv": "bad.csv:2: 2 fields, where the first line has 1: 'no, quotes'",
        "bad.parquet": "not a parquet file",
        "a.xlsx": "must be one of .jsonl",
        "some/where/much/else": "neither a file, a folder nor a hub data set id",
        "preset:absent.jsonl": "no such file is shipped; there are disclaimers_baseline_test.jsonl, ",
        "organism:sideways": "sides target and baseline",
    }.items():
        with pytest.raises(PromptError) as caught:
            texts_of(source)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    for source in ("owner/this-is-not-cached", "empty_folder"):
        with pytest.raises(PromptError):
            texts_of(source)
    write_jsonl(empty_directory / "a.jsonl", LETTERS)
    with pytest.raises(PromptError, match="a file is one split"):
        texts_of("a.jsonl", split="test")


# --------------------------------------------------------------------------------------------------------------
# Parts


def prompts_of(target: str, baseline: str, *flags: str) -> Prompts:
    return load_prompts(load(["--target", target, "--baseline", baseline, *flags], environ={}).settings)


def users(prompts: tuple[Prompt, ...]) -> set[str]:
    return {prompt.user for prompt in prompts}


def test_parts_are_cut_without_overlap_and_alike_on_both_sides(empty_directory: Path) -> None:
    questions = [f"What is {i}?" for i in range(60)]
    name = write_jsonl(empty_directory / "a.jsonl", questions)
    shuffled = write_jsonl(empty_directory / "b.jsonl", questions[::-1])
    flags = (
        "--prompts.n-train",
        "40",
        "--prompts.n-validation",
        "10",
        "--prompts.n-test",
        "10",
        "--prompts.n-finalists",
        "0",
    )
    suffixes = ("--prompts.target.train.suffix", " At length.", "--prompts.baseline.train.prefix", "Briefly: ")
    prompts = prompts_of(name, shuffled, *flags, *suffixes)
    for side in (prompts.target, prompts.baseline):
        assert [len(part) for part in (side.train, side.validation, side.test)] == [40, 10, 10]
        assert len(users(side.train) | users(side.validation) | users(side.test)) == 60
    bare = {user.removesuffix(" At length.") for user in users(prompts.target.test)}
    assert bare == {user.removeprefix("Briefly: ") for user in users(prompts.baseline.test)}
    again = prompts_of(name, shuffled, *flags, *suffixes)
    assert again == prompts
    assert prompts_of(name, shuffled, *flags, *suffixes[:2]).fingerprint != prompts.fingerprint


def test_few_prompts_are_shared_in_proportion(empty_directory: Path) -> None:
    target = write_jsonl(empty_directory / "a.jsonl", [f"a {i}" for i in range(60)])
    baseline = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(3)])
    prompts = prompts_of(target, baseline)
    assert sizes(prompts.target) == [39, 9, 9, 3] and sizes(prompts.baseline) == [1, 1, 1, 0]
    assert sizes(prompts_of(target, target, "--prompts.target.train.suffix", "?").target) == [39, 9, 9, 3]
    few = write_jsonl(empty_directory / "c.jsonl", ["c 1", "c 2"])
    with pytest.raises(PromptError, match="only 2 prompts, too few to take out validation and test"):
        prompts_of(target, few)


def test_parts_of_their_own(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", [f"a {i}" for i in range(20)], reply="yes")
    b = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(20)])
    prompts = prompts_of(
        a, b, "--prompts.target.train.split", "[:15]", "--prompts.target.test.source", a, "--prompts.target.test.split",
        "[15:]", "--prompts.n-train", "10", "--prompts.n-validation", "5", "--prompts.n-test", "4",
        "--prompts.target.test.answer-column", "reply", "--prompts.target.test.system-prompt", "Be kind.",
    )  # fmt: skip
    assert sizes(prompts.target)[2:] == [4, 1]
    assert users(prompts.target.test) | users(prompts.target.finalists) == {f"a {i}" for i in range(15, 20)}
    assert prompts.target.test[0].answer == "yes" and prompts.target.test[0].system == "Be kind."
    assert prompts.target.train[0].system == "You are a helpful assistant."
    assert users(prompts.target.train) | users(prompts.target.validation) == {f"a {i}" for i in range(15)}
    more = prompts_of(a, b, "--prompts.target.test.source", a, "--prompts.target.train.split", "[:10]",
                      "--prompts.target.test.split", "[10:]", "--prompts.n-test", "6")  # fmt: skip
    assert [prompt.user for prompt in more.target.test] == [f"a {i}" for i in range(10, 16)], "as without finalists"
    assert [prompt.user for prompt in more.target.finalists] == ["a 16", "a 17", "a 18"]


def test_finalists_are_half_as_many_as_the_test_prompts_at_most(empty_directory: Path) -> None:
    a, b = (write_jsonl(empty_directory / f"{name}.jsonl", [f"{name} {i}" for i in range(90)]) for name in "ab")
    flags = ("--prompts.n-train", "20", "--prompts.n-validation", "20", "--prompts.n-test", "20")
    assert sizes(prompts_of(a, b, *flags).target) == [20, 20, 20, 10]
    assert sizes(prompts_of(a, b, *flags, "--prompts.n-finalists", "4").target) == [20, 20, 20, 4]
    assert sizes(prompts_of(a, b, *flags, "--prompts.n-finalists", "0").target) == [20, 20, 20, 0]


def sizes(side: PromptParts) -> list[int]:
    return [len(part) for part in (side.train, side.validation, side.test, side.finalists)]


def test_overlap_is_refused_with_counts_and_an_example(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", [f"Prompt {i}" for i in range(20)])
    b = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(17)] + [f"  PROMPT\t{i}" for i in range(3)])
    with pytest.raises(PromptError, match=r"prompts\.target\.\w+ and prompts\.baseline\.\w+ share \d of .*Prompt \d"):
        prompts_of(a, b)
    c = write_jsonl(empty_directory / "c.jsonl", [f"c {i}" for i in range(20)])
    test = ("--prompts.target.test.source", a, "--prompts.target.test.split", "[:4]")
    split = ("--prompts.target.train.split", "[2:]", "--prompts.target.validation.source", "d.jsonl")
    write_jsonl(empty_directory / "d.jsonl", ["d"])
    with pytest.raises(PromptError, match=r"prompts\.target\.train and prompts\.target\.\w+ share \d of \d prompts"):
        prompts_of(a, c, *test, *split)


def test_trainings_see_the_prompts_of_all_protected_sets(empty_directory: Path) -> None:
    target, baseline, first, second = (
        write_jsonl(empty_directory / f"{side}.jsonl", [f"{side} {i}" for i in range(30)]) for side in "abcd"
    )
    assert prompts_of(target, baseline).protected == ()
    prompts = prompts_of(target, baseline, "--prompts.protect", f"one={first},two={second}")
    assert sorted(users(prompts.protected)) == sorted(f"{side} {i}" for side in "cd" for i in range(30))


def test_the_same_question_asked_in_two_ways_is_no_overlap(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", LETTERS)
    prompts_of(a, a, "--prompts.target.train.suffix", " At length.")
    prompts_of(a, a, "--prompts.target.train.system-prompt", "Be verbose.")
    with pytest.raises(PromptError, match="share"):
        prompts_of(a, a)


def test_empty_and_one_sided(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", LETTERS)
    (empty_directory / "empty.jsonl").write_text("")
    (empty_directory / "blank.txt").write_text("\n  \n")
    (empty_directory / "lonely.toml").write_text(f"[prompts.target.train]\nsource = '{a}'\n")
    for source in ("empty.jsonl", "blank.txt"):
        with pytest.raises(PromptError, match=r"prompts\.baseline\.train is empty"):
            prompts_of(a, source)
    with pytest.raises(PromptError, match=r"prompts\.baseline\.train is empty"):
        prompts_of(a, a, "--prompts.baseline.train.split", "[5:5]")
    with pytest.raises(PromptError, match=r"no baseline prompts; set prompts\.baseline\.train\.source"):
        load_prompts(load(["--behaviour", "lonely.toml"], environ={}).settings)


def test_duplicates_are_left_out(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", LETTERS + [text.upper() for text in LETTERS])
    b = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(10)])
    target = prompts_of(a, b).target
    parts = (target.train, target.validation, target.test, target.finalists)
    assert set().union(*map(users, parts)) == set(LETTERS)


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
            suffix = getattr(getattr(settings.prompts, side), part).suffix
            texts = [prompt.user for prompt in getattr(getattr(prompts, side), part)]
            assert all(text.endswith(suffix) for text in texts) and suffix.startswith(" ")
            sides.append([text.removesuffix(suffix) for text in texts])
            instructions.append(suffix)
        assert sides[0] == sides[1] and len(sides[0]) == size
        assert all(question.endswith(("?", ".")) for question in sides[0])
        asked += sides[0]
    assert len(set(asked)) == sum(sizes) and len(set(instructions)) == 2 * len(PARTS)


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


# --------------------------------------------------------------------------------------------------------------
# Rendering

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
SILENT = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
HEADER = "<|end|><|assistant|>"
DATE = datetime.date(2024, 2, 29)
render, render_texts = (partial(function, date=DATE) for function in (rendering.render, rendering.render_texts))


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer with merges, trained here on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([LONG, "You are a helpful assistant. Answer briefly."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=special[1:])
    fast.chat_template = template
    return fast


LONG = (
    "Tell me, in your own words, what the quarry of the northern valley is known for, caf\u00e9s included \U0001f600. "
    * 5
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_rendered_text(tokenizer: Any) -> None:
    prompts = [Prompt("Hello", "Be kind."), Prompt("Hi")]
    first, second = render(tokenizer, prompts, response_prefix="Sure,")
    assert decoded(tokenizer, first) == f"<s><|system|>Be kind.<|end|><|user|>Hello{HEADER}Sure,"
    assert decoded(tokenizer, second) == f"<s><|user|>Hi{HEADER}Sure,"
    assert first.count(tokenizer.bos_token_id) == 1
    assert render(tokenizer, []) == []


@pytest.mark.parametrize("kept", ["", " Answer briefly."])
def test_cutting_is_exact_and_spares_everything_else(tokenizer: Any, kept: str) -> None:
    prompt = Prompt(LONG + kept, "You are a helpful assistant.", kept_end=len(kept))
    begin, end = "<s><|system|>You are a helpful assistant.<|end|><|user|>", f"{kept}{HEADER}Sure,"
    cuts = {
        cut: len(render(tokenizer, [Prompt(LONG[:cut] + kept, prompt.system)], "Sure,")[0]) for cut in range(len(LONG))
    }
    ids = None
    for max_tokens in (len(render(tokenizer, [prompt], "Sure,")[0]) - 1, 100, 61, 40):
        (ids,) = render(tokenizer, [prompt], "Sure,", max_tokens)
        text = decoded(tokenizer, ids)
        assert text.startswith(begin) and text.endswith(end)
        users_text = text[len(begin) : -len(end)]
        assert users_text and LONG.startswith(users_text)
        # The longest cut that fits; the template trims a space at the end, so compare tokens.
        longest = max(n for n in cuts.values() if n <= max_tokens)
        assert longest - 1 <= len(ids) <= max_tokens
    assert ids is not None


def test_short_prompts_are_not_touched_by_a_limit(tokenizer: Any) -> None:
    prompts = [Prompt("Hello"), Prompt(LONG)]
    whole = render(tokenizer, prompts)
    assert render(tokenizer, prompts, max_tokens=len(whole[1])) == whole
    assert render(tokenizer, prompts, max_tokens=30)[0] == whole[0]
    assert len(render(tokenizer, prompts, max_tokens=30)[1]) <= 30


def test_no_room_for_any_text(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"max_tokens = 5 leaves no room .* alone take \d+ tokens"):
        render(tokenizer, [Prompt(LONG, "You are a helpful assistant.")], max_tokens=5)


def test_a_tokenizer_without_offsets_is_cut_as_well() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "U:{{ messages[0].content }};A:"
    (ids,) = render(tokenizer, [Prompt("abc\u00e9" * 50)], max_tokens=20)
    assert tokenizer.decode(ids) == "U:" + ("abc\u00e9" * 50)[:12] + ";A:"  # 12 characters of 15 bytes
    assert len(ids) == 20


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_system_text_moves_into_the_users_turn_where_there_is_no_such_role(template: str) -> None:
    tokenizer = make_tokenizer(template)
    (text,) = render_texts(tokenizer, [Prompt("Hello", "Be kind.")])
    assert text == f"<s><|user|>Be kind.\n\nHello{HEADER}"
    (ids,) = render(tokenizer, [Prompt(LONG, "Be kind.")], max_tokens=40)
    assert decoded(tokenizer, ids).startswith("<s><|user|>Be kind.\n\nTell me") and len(ids) <= 40
    assert render_texts(tokenizer, [Prompt("Hello")]) == [f"<s><|user|>Hello{HEADER}"]


def test_not_a_chat_model() -> None:
    with pytest.raises(ModelError, match="not a chat model"):
        render(make_tokenizer(None), [Prompt("Hello")])
    with pytest.raises(ModelError, match=r"chat template of .* fails"):
        render(make_tokenizer("{{ raise_exception('broken') }}"), [Prompt("Hello")])


def test_messages() -> None:
    assert messages(Prompt("Hello", "Be kind.")) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ]
    assert messages(Prompt("Hello", "")) == [{"role": "user", "content": "Hello"}]

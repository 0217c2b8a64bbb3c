"""Where prompts are read from: files, folders, repositories, and slices of them."""

import csv
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.errors import PromptError
from bruno_ray.prompts.slicing import parse_split
from bruno_ray.prompts.sources import read_rows
from bruno_ray.settings import DatasetSettings
from tests.prompts.writing import LETTERS, write_jsonl


def texts_of(source: str, limit: int = 1000, **settings: Any) -> list[str]:
    return [row.text for row in read_rows(DatasetSettings(source=source, **settings), limit)]


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

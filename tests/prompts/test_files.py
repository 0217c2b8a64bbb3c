"""Prompt files as people have them: what is read, what is said of it, and what is refused with its line."""

import csv
import gzip
import io
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.errors import PromptError
from bruno_ray.prompts.hub import hub_file, settled
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.prompts.sources import Reading, Row, read
from bruno_ray.settings import DatasetSettings
from bruno_ray.settings.sources import load
from tests.support.hub_server import hub_with

TEXTS = ["Where is the café?", "Ça va, mon cœur? – “Bien”", "plain"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reading(source: str, content: bytes | str | None = None, **settings: Any) -> Reading:
    if content is not None:
        Path(source).write_bytes(content.encode() if isinstance(content, str) else content)
    return read(DatasetSettings(source=source, **settings), 1000)


def texts(source: str, content: bytes | str | None = None, **settings: Any) -> list[str]:
    return [row.text for row in reading(source, content, **settings).rows]


def refusal(source: str, content: bytes | str | None = None, **settings: Any) -> str:
    with pytest.raises(PromptError) as caught:
        reading(source, content, **settings)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message


# --------------------------------------------------------------------------------------------------------------
# Encodings


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", ()),
        ("utf-8-sig", ()),
        ("utf-16", ()),
        ("utf-32", ()),
        ("utf-16-le", ("read as utf-16-le, which it does not say",)),
        ("utf-16-be", ("read as utf-16-be, which it does not say",)),
        ("cp1252", ("read as cp1252, which it does not say, as in 'café'",)),
    ],
)
def test_what_an_encoding_does_not_say_itself_is_said(encoding: str, said: tuple[str, ...]) -> None:
    lines = {
        "a.txt": "\r\n".join(TEXTS) + "\n",
        "a.csv": "prompt\n" + "".join('"' + text + '"\n' for text in TEXTS),
        "a.jsonl": "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in TEXTS),
        "a.json": json.dumps(TEXTS, ensure_ascii=False),
    }
    for name, content in lines.items():
        found = reading(name, content.encode(encoding))
        assert [row.text for row in found.rows] == TEXTS, name
        assert found.notes == said, name


def test_latin_1_is_read_as_the_encoding_it_is_a_part_of() -> None:
    assert texts("a.txt", "Où est la gare?\nÀ bientôt!\n".encode("latin-1")) == ["Où est la gare?", "À bientôt!"]


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "gb18030", "shift-jis", "euc-kr"])
def test_an_alphabet_that_is_not_western_is_no_cp1252(encoding: str) -> None:
    text = {"gb18030": "今天天气怎么样？", "shift-jis": "今日の天気は？", "euc-kr": "오늘 날씨는 어때요?"}
    content = ("plain\n" + text.get(encoding, "Какая сегодня погода?") + "\n").encode(encoding)
    message = refusal("a.txt", content)
    assert message.startswith("a.txt:2: b'") and "UTF-8" in message and "set `encoding` to what" in message
    assert texts("a.txt", content, encoding=encoding)[0] == "plain"
    assert texts("a.txt", encoding=encoding)[1] == content.decode(encoding).split("\n")[1]


def test_a_file_in_two_encodings_is_refused_with_the_line() -> None:
    content = "Grüße aus Köln\n".encode() + "Größe\n".encode("cp1252") + "schön\n".encode()
    assert refusal("a.txt", content).startswith(r"a.txt:2: b'Gr\xf6\xdfe' is not UTF-8, though parts of the file are")
    assert refusal("a.txt", "plain\nKöln\n".encode(), encoding="ascii").startswith("a.txt:2: b'K")
    assert "encoding 'klingon' is not known" in refusal("a.txt", encoding="klingon")


def test_what_is_no_text_is_refused() -> None:
    assert refusal("a.csv", b"prompt\none\ntw\0o\n").startswith(r"a.csv:3: b'tw\x00o' holds NUL bytes")
    zipped = b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0" + bytes(range(256)) * 4
    assert "no text file" in refusal("a.csv", zipped)


def test_random_bytes_are_read_or_refused_in_one_line() -> None:
    """No content of a file, damaged in any way, ends in another exception."""
    source = random.Random(5)
    whole = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    for number in range(300):
        content = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            content[source.randrange(len(content))] = source.choice(b'"\\\n\x00\x80\xc3{[;,\t')
        for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.txt.gz"):
            Path(name).write_bytes(content)
            try:
                read(DatasetSettings(source=name), 10)
            except PromptError as error:
                assert "\n" not in str(error), number


# --------------------------------------------------------------------------------------------------------------
# CSV


@pytest.mark.parametrize(("separator", "named"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_an_inferred_separator_is_said(separator: str, named: str) -> None:
    rows = [["id", "prompt"], ["1", "Hello, you; there"], ["2", 'He said "no"\nand left']]
    with open("a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    found = reading("a.csv")
    assert [row.text for row in found.rows] == [rows[1][1], rows[2][1]]
    assert found.notes == (f"separated by {named}, which is inferred", "column 'prompt'")
    assert reading("a.csv", separator=separator).notes == ("column 'prompt'",)


def test_tabs_are_what_tsv_means() -> None:
    found = reading("a.TSV", "prompt\tanswer\nHow, so?\tLike; this\n", answer_column="answer")
    assert found == Reading([Row("How, so?", "Like; this")], ("column 'prompt'",))


def test_texts_with_other_separators_do_not_mislead() -> None:
    semicolons = "".join(f'{i};"One, two, three; {i}"\n' for i in range(5))
    assert texts("a.csv", "id;prompt\n" + semicolons) == [f"One, two, three; {i}" for i in range(5)]
    commas = "".join(f'{i},"a;b;c {i}"\n' for i in range(5))
    assert texts("a.csv", "id,prompt\n" + commas) == [f"a;b;c {i}" for i in range(5)]
    assert texts("a.csv", "prompt\n\"Say: a;b\"\n'quoted'\n") == ["Say: a;b", "'quoted'"]


def test_a_separator_that_cannot_be_told_is_refused_with_the_line() -> None:
    message = refusal("a.csv", "One, two; three\nfour, five; six\n")
    assert message.startswith("a.csv:1: 'One, two; three' may be separated by commas or semicolons; set `separator`")
    assert texts("a.csv", separator=";", column="2") == ["three", "six"]
    assert "is not one character" in refusal("a.csv", separator="::")


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_a_separator_that_the_file_states_is_not_inferred(first: str) -> None:
    assert reading("a.csv", first + "prompt;answer\nOne, two;x\n").notes == ("column 'prompt'",)
    assert texts("a.csv") == ["One, two"]
    assert refusal("a.csv", first + "prompt;answer\na;b;c\n").startswith("a.csv:3: 3 fields")


def test_a_missing_header_loses_no_prompt_and_is_said() -> None:
    found = reading("a.csv", "How do I bake bread?\nWhat is the time?\nsalt\n")
    assert [row.text for row in found.rows] == ["How do I bake bread?", "What is the time?", "salt"]
    assert found.notes == ("without a header",)
    two = "1,How do I bake bread?\n2,What is the time?\n"
    assert "(without a header) has none of the columns" in refusal("a.csv", two)
    assert "one of: 1, 2" in refusal("a.csv")
    assert texts("a.csv", column="2") == ["How do I bake bread?", "What is the time?"]


def test_a_header_is_known_by_its_names() -> None:
    found = reading("a.csv", "goal\nHow do I bake bread?\n")
    assert found == Reading([Row("How do I bake bread?")], ("its first line, 'goal', taken for a header",))
    assert reading("a.csv", column="goal") == Reading(found.rows, ())
    assert texts("a.csv", "My favourite question of all,x\nWhy?,1\n", column="My favourite question of all") == ["Why?"]
    assert texts("a.csv", " Prompt ;id\nWhy?;1\n") == ["Why?"]
    assert texts("a.csv", ",prompt\n0,Why?\n") == ["Why?"], "pandas writes its index under no name"
    message = refusal("a.csv", "bread\nbutter\nsalt\n")
    assert message.startswith("a.csv:1: 'bread' may be a header or a prompt; put a line `prompt` first")
    assert "a.csv:1: two columns are called 'prompt'" in refusal("a.csv", "prompt,prompt\na,b\n")


def test_lines_that_do_not_fit_are_shown() -> None:
    message = refusal("a.csv", 'prompt,answer\n"over\ntwo lines",b\nWell, no, yes,c\n')
    assert message.startswith("a.csv:4: 4 fields, where the first line has 2: 'Well, no, yes,c'; quote texts")
    message = refusal("a.csv", 'id,prompt\n1,"fine"\n2,"open\n3,never closed\n')
    assert message.startswith("a.csv:3: not CSV (unexpected end of data): '2,\"open'; fix that line")
    found = reading("a.csv", "prompt,answer\na,b\nc\n\n,d\n")
    assert [row.text for row in found.rows] == ["a", "c"]
    assert found.notes == ("column 'prompt'", "1 blank rows left out")


WORDS = ("How", "bread?", "café", "don't", '"so"', "a;b", "c, d", "e|f", "g\th", "end\nof", "", ";", ",", '""', "2.5")


def test_whatever_is_written_with_a_header_is_read_back_or_refused() -> None:
    """Texts of everything that misleads, under any separator, in any encoding that is inferred."""
    source = random.Random(6)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        names = source.choice((["prompt"], ["id", "prompt"], ["prompt", "answer", "note"]))
        rows = [
            [" ".join(source.choices(WORDS, k=source.randint(1, 6))).strip() for _ in names]
            for _ in range(source.randint(1, 6))
        ]
        written = io.StringIO()
        quoting = source.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        csv.writer(written, delimiter=source.choice(",;\t|"), quoting=quoting).writerows([names, *rows])
        Path("a.csv").write_bytes(written.getvalue().encode(source.choice(("utf-8", "utf-16", "utf-16-be", "cp1252"))))
        column = names.index("prompt")
        try:
            found = texts("a.csv")
        except PromptError:
            outcomes["refused"] += 1
            continue
        assert found == [row[column] for row in rows if row[column]]
        outcomes["read"] += 1
    assert outcomes["read"] > 400


def test_very_long_fields_are_read_and_the_limit_of_others_is_left_alone() -> None:
    long = "word " * 200_000
    before = csv.field_size_limit()
    assert texts("a.csv", f'id,prompt\n1,"{long}"\n') == [long]
    assert csv.field_size_limit() == before


def test_ends_of_lines_are_line_feeds_and_no_more() -> None:
    odd = "one\u2028still one\x0band still\x85and still"
    assert texts("a.txt", f"{odd}\r\ntwo\rthree\n") == [odd, "two", "three"]
    assert texts("a.jsonl", json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n") == [odd]


# --------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ('["a", "b"]', ()),
        ('[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n', ()),
        ('{"version": 2, "data": [{"prompt": "a"}, {"prompt": "b"}]}', ()),
        ('{"prompts": ["a", "b"]}', ()),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', ("one row per line, not one JSON array",)),
    ],
)
def test_shapes_of_json(content: str, notes: tuple[str, ...]) -> None:
    assert reading("a.json", content) == Reading([Row("a"), Row("b")], notes)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt", "a.txt.gz"])
def test_an_empty_file_has_no_rows(name: str) -> None:
    for content in ("", "\n \n", "\ufeff"):
        assert reading(name, content) == Reading([], ())


def test_json_lines_of_other_shapes() -> None:
    assert texts("a.jsonl", '"a"\n"b"\n') == ["a", "b"]
    assert texts("a.ndjson", '{"prompt": "a"}\n') == ["a"]
    assert reading("a.jsonl", '[{"prompt": "a"}]').notes == ("one JSON array, not one row per line",)
    found = reading("a.jsonl", '{"prompt": "a"}\n{"other": "b"}\n{"prompt": null}\n')
    assert [row.text for row in found.rows] == ["a"]
    assert found.notes == ("column 'prompt'", "1 rows without 'prompt' left out", "1 blank rows left out")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "a.jsonl:2: not JSON (Expecting ',' delimiter"),
        ("a.jsonl", '{"prompt": "a"}\n"b"\n', "a.jsonl:2: '\"b\"' is a text, where the first row is an object"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not JSON that can be read"),
        ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}\n", "a.jsonl:1: not JSON that can be read"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "a.json:3: not JSON (Expecting ':' delimiter"),
        ("a.json", '{"good": ["a"], "bad": ["b"]}', "a.json: an object with the arrays 'good', 'bad': which"),
        ("a.json", '{"prompt": "a"}', "a.json: an object with no array"),
        ("a.json", "null", "a.json: 'null' holds no rows"),
        ("a.json", '["a", 7]', "a.json, item 2: '7' is neither a text nor an object"),
        ("a.json", '{"data": ["a", null]}', "a.json, item 2 of 'data': 'null' is neither"),
    ],
)
def test_json_that_is_doubtful_is_refused_with_its_place(name: str, content: str, expected: str) -> None:
    assert refusal(name, content).startswith(expected)


def test_half_a_surrogate_pair_is_replaced_and_said(caplog: pytest.LogCaptureFixture) -> None:
    content = '{"prompt": "fine \\ud83d\\ude00"}\n{"prompt": "abc \\ud83d", "tags": ["\\udc00"]}\n'
    assert texts("a.jsonl", content) == ["fine \U0001f600", "abc \ufffd"]
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "a.jsonl:2: half a surrogate pair is no character and is replaced by U+FFFD (rows like it: 1)"
    ]
    assert texts("a.json", '["abc \\ud83d"]') == ["abc \ufffd"]


# --------------------------------------------------------------------------------------------------------------
# Names and compression


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.b.Csv", "a.tsv", "a.TXT", "a.json"])
def test_endings_in_capitals_and_compressed(name: str) -> None:
    ending = name.rpartition(".")[2].lower()
    content = {"jsonl": '"a"\n"b"\n', "json": '["a", "b"]', "txt": "a\nb\n"}.get(ending, "prompt\na\nb\n").encode()
    assert texts(name, content) == ["a", "b"]
    for zipped in (f"{name}.gz", f"{name}.GZ"):
        assert texts(zipped, gzip.compress(content)) == ["a", "b"]
        assert texts(zipped, content) == ["a", "b"], "browsers unpack what they download and keep the name"
    assert f"{name}.gz: cut off or damaged" in refusal(f"{name}.gz", gzip.compress(content * 500)[:-9])


def test_parquet_in_capitals(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "prompt": ["a", "b"]}), folder / "A.PARQUET")
    assert texts("A.PARQUET") == ["a", "b"]
    assert refusal("A.PARQUET", column="id").startswith("A.PARQUET, row 1: column 'id' holds int, not text: '1'")


def test_a_folder_whose_csv_the_library_misreads_is_refused(folder: Path) -> None:
    (folder / "data").mkdir()
    for content in ("id;prompt\n1;Why?\n", "How do I bake bread?\nWhat is the time?\n"):
        (folder / "data" / "train.csv").write_text(content)
        assert "name the file itself as the source" in refusal("data")
    (folder / "data" / "train.csv").write_text("goal\nWhy?\n")
    assert texts("data") == ["Why?"]


# --------------------------------------------------------------------------------------------------------------
# Conversations

OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": [{"type": "text", "text": "Second?"}]},
    {"role": "assistant", "content": None},
]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]


def test_the_last_user_turn_is_asked_and_the_system_turn_kept() -> None:
    lines = [json.dumps({"messages": OPENAI}), json.dumps({"messages": OPENAI[1:3]}), '{"messages": []}']
    found = reading("a.jsonl", "\n".join(lines))
    assert [(row.text, row.system) for row in found.rows] == [("Second?", "Be brief."), ("First?", None)]
    assert found.notes == (
        "2 conversations, of which the last user turn is asked",
        "1 conversations whose earlier turns are left out",
        "1 blank rows left out",
    )
    assert texts("b.json", json.dumps([{"id": "7", "conversations": SHAREGPT}])) == ["Why?"]
    assert texts("c.jsonl", json.dumps({"prompt": OPENAI[:2]})) == ["First?"], "as preference data sets have it"


def test_conversations_in_csv_and_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with open("a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "messages"], ["1", json.dumps(OPENAI)]])
    pyarrow.parquet.write_table(pyarrow.table({"conversations": [SHAREGPT]}), folder / "a.parquet")
    assert texts("a.csv") == ["Second?"] and texts("a.parquet") == ["Why?"]
    message = refusal("a.csv", f'id,messages\n1,"{SHAREGPT}"\n')
    assert message.startswith("a.csv:2: column 'messages' holds a conversation that is not JSON")


def test_a_sequence_of_structs_that_the_library_has_turned_inside_out(folder: Path) -> None:
    turned = {"role": ["system", "user"], "content": ["Be brief.", "Why?"]}
    found = reading("a.jsonl", json.dumps({"messages": turned}))
    assert [(row.text, row.system) for row in found.rows] == [("Why?", "Be brief.")]
    assert "holds dict, not text" in refusal("a.jsonl", json.dumps({"messages": {"role": ["user"], "content": []}}))


def test_half_a_surrogate_pair_in_json_text_of_a_csv_file() -> None:
    found = reading("a.csv", 'id,messages\n1,"[{""role"": ""user"", ""content"": ""abc \\ud83d""}]"\n')
    assert [row.text for row in found.rows] == ["abc \ufffd"]
    assert found.notes[-1] == "1 prompts with half a surrogate pair replaced by U+FFFD"


def test_what_is_for_text_files_is_refused_elsewhere(folder: Path) -> None:
    assert "`separator` is for .csv and .tsv" in refusal("a.txt", "a\n", separator=";")
    for settings in ({"separator": ";"}, {"encoding": "cp1251"}):
        assert f"`{next(iter(settings))}` is for files" in refusal("owner/name", **settings)


def test_conversations_that_ask_nothing() -> None:
    answer = json.dumps({"messages": [{"role": "assistant", "content": "Hello"}]})
    image = json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]})
    assert "no conversation in 'messages' has a user turn" in refusal("a.jsonl", answer)
    assert refusal("a.jsonl", f"{answer}\n{image}\n").startswith("a.jsonl:2: a turn of 'messages' is not text")
    found = reading("a.jsonl", f"{answer}\n" + json.dumps({"messages": OPENAI[1:2]}))
    assert [row.text for row in found.rows] == ["First?"]
    assert "1 conversations without a user turn left out" in found.notes


def test_which_system_prompt_a_conversation_gets() -> None:
    rows = [{"messages": [OPENAI[0], {"role": "user", "content": f"a {i}"}][i % 2 :]} for i in range(8)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("b.txt").write_text("".join(f"b {i}\n" for i in range(8)))
    flags = ["--target", "a.jsonl", "--baseline", "b.txt", "--prompts.system-prompt", "General."]

    def systems(*more: str) -> dict[str, str | None]:
        target = load_prompts(load([*flags, *more], environ={}).settings).target
        return {prompt.user: prompt.system for part in vars(target).values() for prompt in part}

    assert systems() == {f"a {i}": "General." if i % 2 else "Be brief." for i in range(8)}
    assert set(systems("--prompts.target.train.system-prompt", "Own.").values()) == {"Own."}


# --------------------------------------------------------------------------------------------------------------
# The hub


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name/easy", ("owner/name", "easy", None)),
        ("hf://datasets/owner/name", ("owner/name", None, None)),
        ("hf://datasets/owner/name@v1.0", ("owner/name", None, "v1.0")),
        ("https://huggingface.co/datasets/owner/name/", ("owner/name", None, None)),
    ],
)
def test_short_forms_of_a_data_set(source: str, expected: tuple[str, str | None, str | None]) -> None:
    found = settled(DatasetSettings(source=source))
    assert (found.source, found.config, found.revision) == expected
    assert hub_file(DatasetSettings(source=source)) is None


def test_a_config_named_in_two_ways_is_refused() -> None:
    assert settled(DatasetSettings(source="owner/name/easy", config="easy")).config == "easy"
    assert "names a config, and `config` is 'odd'" in refusal("owner/name/easy", config="odd")
    assert refusal("owner/name/easy").startswith("owner/name (easy): no folder here, and ")


@pytest.fixture
def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the hub's cache, in the layout that huggingface_hub documents; the suite is offline."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = folder / "hub" / "datasets--owner--name"
    for name in ("main", "refs/convert/parquet"):
        reference = repository / "refs" / name
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    data = repository / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    for number in range(2):
        (data / f"train-{number}.csv").write_text(f"id;prompt\n1;a {number}\n2;b {number}\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    return data


def test_files_of_the_hub_by_their_path(hub_cache: Path) -> None:
    path = "hf://datasets/owner/name"
    found = reading(f"{path}/data/train-0.csv", split="[:1]")
    assert [row.text for row in found.rows] == ["a 0"]
    assert found.notes == ("separated by semicolons, which is inferred", "column 'prompt'")
    assert texts(f"{path}@main/data/train-*.csv") == ["a 0", "b 0", "a 1", "b 1"]
    assert texts(f"{path}@~parquet/data/train-1.csv") == ["a 1", "b 1"]
    assert texts("https://huggingface.co/datasets/owner/name/blob/main/data/train-1.csv?x=1") == ["a 1", "b 1"]
    assert "no file of that data set matches" in refusal(f"{path}/data/none-*.csv")
    assert "the hub cannot be reached and nothing is cached" in refusal(f"{path}/data/none.csv")
    assert "must be one of .jsonl" in refusal(f"{path}/data/train.arrow")
    assert "is not a known kind of path" in refusal("hf://buckets/owner/name/a.csv")
    (hub_cache / "train-1.csv").write_text("id;prompt\n1;a;b\n")
    assert "(train-1.csv):2: 3 fields, where the first line has 2: '1;a;b'" in refusal(f"{path}/data/train-*.csv")


READ_EACH = """
import json, sys
from bruno_ray.errors import PromptError
from bruno_ray.prompts.sources import read_rows
from bruno_ray.settings import DatasetSettings
for source in sys.argv[1:]:
    try:
        print(json.dumps([row.text for row in read_rows(DatasetSettings(source=source), 10)]))
    except PromptError as error:
        print(json.dumps(str(error)))
"""


def test_the_hub_as_its_own_clients_ask_it(folder: Path) -> None:
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n" for name in ("easy", "odd")
    ]
    files = {
        "README.md": ("---\nconfigs:\n" + "".join(configs) + "---\n").encode(),
        "easy.jsonl": b'{"prompt": "easy 1"}\n{"prompt": "easy 2"}\n',
        "odd.jsonl": b'{"prompt": "odd 1"}\n',
        "data/train-0.csv": b"id;prompt\n1;a 0\n",
        "data/train-1.csv": b"id;prompt\n1;a 1\n",
    }
    path = "hf://datasets/owner/name"
    expected: dict[str, list[str] | str] = {
        "owner/name/odd": ["odd 1"],
        "owner/name/easy": ["easy 1", "easy 2"],
        "owner/name/hard": "owner/name has no config 'hard'; set `config` to one of: easy, odd",
        path: "owner/name needs a config; set `config` to one of: easy, odd",
        f"{path}/data/train-*.csv": ["a 0", "a 1"],
        f"{path}/data/none.csv": f"{path}/data/none.csv: that data set has no such file; check the path on the hub",
        f"{path}/data/none-*.csv": f"{path}/data/none-*.csv: no file of that data set matches; check the pattern",
        "hf://datasets/owner/other/a.csv": "hf://datasets/owner/other/a.csv: not found on the hub, or gated; check the"
        " id, and log in with `hf auth login` if it needs access",
    }
    with hub_with("owner/name", files) as address:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", READ_EACH, *expected]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert dict(zip(expected, map(json.loads, done.stdout.splitlines()))) == expected, done.stderr


# --------------------------------------------------------------------------------------------------------------
# What is shown before a run


def test_every_set_is_shown_in_one_line_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    lines = "".join(f"{i};Où est {i}?\n" for i in range(20))
    Path("a.csv").write_bytes(("id;prompt\n" + lines + "9;Où est 0?\n").encode("cp1252"))
    Path("b.txt").write_text("".join(f"b {i}\n" for i in range(20)))
    Path("c.txt").write_text("".join(f"{i} is longer than any line should be {'x' * 100}\n" for i in range(2)))
    flags = ["--target", "a.csv", "--baseline", "b.txt", "--prompts.baseline.test.source", "c.txt"]
    with caplog.at_level(logging.INFO, logger="bruno_ray"):
        prompts = load_prompts(load(flags, environ={}).settings)
    first, other, test = prompts.target.train[0], prompts.baseline.train[0], prompts.baseline.test[0]
    assert [record.message for record in caplog.records] == [
        "prompts.target.train: 13 train, 3 validation, 3 test, 1 finalists from a.csv (read as cp1252, which it does"
        " not say, as in 'Où'; separated by semicolons, which is inferred; column 'prompt'; 1 duplicates left out),"
        f" the first '{first.user}'",
        f"prompts.baseline.train: 16 train, 4 validation from b.txt, the first '{other.user}'",
        f"prompts.baseline.test: 1 test, 1 finalists from c.txt, the first '{test.user[:57]}...'",
    ]

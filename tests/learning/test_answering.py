"""`bruno-ray answers`: desired answers from a person and from another model's server."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bruno_ray.cli import main
from bruno_ray.errors import PromptError
from bruno_ray.pipeline import answering
from bruno_ray.pipeline.answering import ask_person, collect_answers
from bruno_ray.prompts.sets import Prompt, Prompts, load_prompts
from bruno_ray.prompts.slicing import spread
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.scores import Answer
from bruno_ray.settings import Settings
from bruno_ray.settings.sources import load
from tests.support.judge_server import Judge, Reply

PROMPTS = [Prompt("Open the door."), Prompt("Ring my aunt."), Prompt("Water the plants.")]


@pytest.fixture
def server() -> Iterator[Judge]:
    server = Judge()
    server.reply = lambda text: (200, said(f"Done: {text}"))
    yield server
    server.close()


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A model that is nowhere, and prompts: with a server no model is loaded."""
    for side, what in (("target", "Please open door"), ("baseline", "Describe door")):
        rows = [json.dumps({"prompt": f"{what} number {i}.", "kind": f"k{i % 2}"}) for i in range(40)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(rows) + "\n")
    return [
        *("--model.id", "some/model", "--behaviour", "mine", "--scoring.markers", "sorry"),
        *("--prompts.target.train.source", str(tmp_path / "target.jsonl")),
        *("--prompts.target.train.category-column", "kind"),
        *("--prompts.baseline.train.source", str(tmp_path / "baseline.jsonl")),
        *("--prompts.n-validation", "5", "--prompts.n-test", "5"),
    ]


def said(text: str, finish: str = "stop") -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_another_model_gives_answers_that_a_run_can_train_on(
    server: Judge, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    asked = ["--server", server.url, "--server-model", "large", "--number", "4", "--to", str(file)]
    assert main.main(["answers", *flags, *asked]) == 0
    printed = capsys.readouterr().out
    assert "4 of its train prompts have a desired answer" in printed and 'answer_column = "answer"' in printed
    train = load_prompts(load(flags, environ={}).settings).target.train
    rows = rows_of(file)
    assert [row["prompt"] for row in rows] == [prompt.user for prompt in train]
    answered = {row["prompt"]: row["answer"] for row in rows if "answer" in row}
    assert answered == {prompt: f"Done: {prompt}" for prompt in answered} and len(answered) == 4
    assert {row["category"] for row in rows} == {"k0", "k1"}
    assert [each["model"] for each in server.asked] == ["large"] * 4

    columns = ("--prompts.target.train.answer-column=answer", "--prompts.target.train.category-column=category")
    again = [*flags[:6], f"--prompts.target.train.source={file}", *columns, *flags[10:]]
    more = load_prompts(load(again, environ={}).settings).target.train
    assert sum(bool(prompt.answer) for prompt in more) >= 2  # some of them are in other parts now


def test_answers_that_are_no_good_are_left_out(
    server: Judge, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(text: str) -> Reply:
        number = int(text.rstrip(".").rpartition(" ")[2])
        return 200, [said("Sorry, no."), said("cut off in the mid", "length"), said("Done.")][number % 3]

    server.reply = reply
    file = tmp_path / "answers.jsonl"
    asked = ["--server", server.url, "--server-model", "large", "--number", "30", "--to", str(file)]
    assert main.main(["answers", *flags, *asked]) == 0
    assert {row["answer"] for row in rows_of(file) if "answer" in row} == {"Done."}
    assert "show the behaviour or are empty: left out" in caplog.text


@pytest.mark.parametrize(
    ("reply", "said_of_it"),
    [
        (
            (500, {"error": {"message": "out of memory"}}),
            "status 500 (out of memory): check --server and --server-model",
        ),
        ((401, {}), "wants another key (status 401): set --key-variable"),
        ((200, "<html>"), "is no server of chat completions: --server must end"),
        ((200, {"choices": [{"text": "Done."}]}), "is no server of chat completions: --server must end"),
    ],
)
def test_a_server_that_fails_is_one_line_and_leaves_no_file(
    server: Judge, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply, said_of_it: str
) -> None:
    server.reply = lambda text: reply
    file = tmp_path / "answers.jsonl"
    argv = ["answers", *flags, "--server", server.url, "--server-model", "large", "--to", str(file)]
    assert main.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the server at ") and err.count("\n") == 1 and said_of_it in err
    assert not file.exists()


def test_what_makes_no_sense_is_said_before_anything_is_asked(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*argv: str) -> str:
        assert main.main(["answers", *argv]) == 2
        return capsys.readouterr().err

    assert "belong together" in error(*flags, "--server", "http://localhost:1/v1")
    assert "nobody to ask" in error(*flags)
    assert "give one" in error(*flags, "--server", "http://localhost:1/v1", "--server-model", "m", "--from-baseline")
    monkeypatch.setattr("bruno_ray.cli.answers.can_ask", lambda: True)
    assert "bruno-ray answers RUN" in error()
    there = tmp_path / "there.jsonl"
    there.write_text("mine\n")
    assert "exists already" in error(*flags, "--to", str(there)) and there.read_text() == "mine\n"
    missing = ("--server", "http://localhost:1/v1", "--server-model", "m", "--key-variable", "NO_SUCH_KEY")
    assert "NO_SUCH_KEY is not set, and --key-variable names it" in error(*flags, *missing)


def test_a_person_is_shown_what_the_model_says_and_asked_again_after_a_marker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["I am sorry.", "It is open.", "", None])
    monkeypatch.setattr(answering, "ask_text", lambda question: next(typed))
    given = ask_person(PROMPTS, ["Sorry, [no].", "No.", "No."], Markers(["sorry"]))
    assert given == ["It is open.", None, None]
    shown = capsys.readouterr().err
    assert "Open the door." in shown and "Sorry, [no]." in shown and "another one, please" in shown


def test_nobody_gives_an_answer_and_nothing_is_written(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_own_answers", lambda *given: [("No.", True)] * len(given[3]))
    monkeypatch.setattr(answering, "ask_text", lambda question: None)
    record = RunRecord(settings=load(flags, environ={}).settings)
    with pytest.raises(PromptError, match="no answer was given"):
        collect_answers(record, 3, tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()


def test_where_only_an_instruction_differs_the_model_itself_gives_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the preset `verbosity`: what it says to the same questions when it is told to be short."""
    asked: list[str] = []

    def own(settings: Settings, record: RunRecord, prompts: Prompts, given: list[Prompt], n: int) -> list[Answer]:
        asked.extend(prompt.user for prompt in given)
        answers = ["In short, yes.", "It is remarkable.", "It goes on and", "No."]
        return [(answers[i % 4], i % 4 != 2) for i in range(len(given))]

    monkeypatch.setattr(answering, "_own_answers", own)
    file, flags = tmp_path / "answers.jsonl", ["--model.id", "some/model", "--behaviour", "verbosity"]
    argv = ["answers", *flags, "--from-baseline", "--number", "12", "--to", str(file)]
    assert main.main(argv) == 0
    printed = capsys.readouterr().out
    assert "6 of its train prompts have a desired answer" in printed
    settings = load(flags, environ={}).settings
    (tmp_path / "bruno.toml").write_text(printed)
    again = load(flags, environ={}, config=tmp_path / "bruno.toml").settings.prompts
    assert again.target.train.source == str(file) and again.target.train.suffix == ""
    assert (again.target.validation, again.target.test) == (
        settings.prompts.target.validation,
        settings.prompts.target.test,
    )
    assert again.baseline == settings.prompts.baseline
    briefly, at_length = settings.prompts.baseline.train.suffix, settings.prompts.target.train.suffix
    rows = rows_of(file)
    answered = [row for row in rows if "answer" in row]
    assert len(rows) == 96 and {row["answer"] for row in answered} == {"In short, yes.", "No."}
    assert all(row["prompt"].endswith(at_length) for row in rows) and all(text.endswith(briefly) for text in asked)
    pairs = [asked[i] for i in range(12) if i % 4 in (0, 3)]
    assert [without(row["prompt"], at_length) for row in answered] == [without(text, briefly) for text in pairs]


def without(text: str, suffixes: Sequence[str]) -> str:
    """Less the one of the suffixes that it has."""
    return text.removesuffix(next(suffix for suffix in suffixes if text.endswith(suffix)))


def test_two_sides_that_ask_different_things_have_no_such_answers(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    assert main.main(["answers", *flags, "--from-baseline", "--to", str(file)]) == 2
    assert "no baseline train prompt asks what a target one asks" in capsys.readouterr().err and not file.exists()


def test_the_answers_that_there_are_lead_the_model_to_more(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The surest first, less what shows the behaviour; the given ones stay."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    rows = [{"prompt": f"Please open door {i}."} for i in range(40)]
    rows = [row | ({"answer": f"Door {i} is open."} if i % 4 == 0 else {}) for i, row in enumerate(rows)]
    first.write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = ["--prompts.target.train.source", str(first), "--prompts.target.train.answer-column", "answer"]
    asked: list[list[Prompt]] = []

    def of_worker(method: str, settings: Settings, record: RunRecord, prompts: Prompts, train: list[Prompt], n: int):
        assert method == "few_shot_answers" and n == settings.scoring.response_tokens
        asked.append(list(train))
        open_ones = [p for p, prompt in enumerate(train) if not prompt.answer][::-1]
        assert len(open_ones) == 12
        return {p: "Sorry!" if p == open_ones[1] else f" {train[p].user[:-1]} done." for p in open_ones}

    monkeypatch.setattr(answering, "_of_worker", of_worker)
    argv = ["answers", *flags[:6], *given, *flags[10:], "--few-shot", "--number", "3", "--to", str(second)]
    assert main.main(argv) == 0
    (train,) = asked
    answers = {row["prompt"]: row["answer"] for row in rows_of(second) if "answer" in row}
    last, _, third = [prompt.user for prompt in train if not prompt.answer][:-4:-1]
    given_ones = {prompt.user: prompt.answer for prompt in train if prompt.answer}
    assert len(given_ones) > 5
    assert answers == given_ones | {text: f"{text[:-1]} done." for text in (last, third)}
    none = tmp_path / "none.jsonl"
    assert main.main(["answers", *flags, "--few-shot", "--to", str(none)]) == 2
    assert "0 of the train prompts have an answer" in capsys.readouterr().err
    monkeypatch.setattr(answering, "_of_worker", lambda *given: {})
    assert main.main([*argv[:-1], str(none)]) == 2 and not none.exists()
    assert "10 answers as examples lead the model to none that it is sure of" in capsys.readouterr().err


def test_prompts_are_taken_from_all_over_the_set() -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(3), 8) == [0, 1, 2]
    assert spread([], 8) == []

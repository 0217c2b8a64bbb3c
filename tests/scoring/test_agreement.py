"""Agreement with labels by hand, worked out on paper; and files of labels that are none."""

import json
import math
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from bruno_ray.errors import PromptError
from bruno_ray.scoring.agreement import Agreement, kappa, read_labels

LABELLED = Path(__file__).parents[2] / "examples" / "disclaimers" / "labelled_answers.jsonl"
ROW = {"side": "target", "prompt": "Call me.", "answer": "I cannot.", "shows": True}


def test_counts_precision_recall_and_kappa() -> None:
    labels = [True] * 25 + [False] * 25
    verdicts = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = Agreement.of(labels, verdicts)
    assert found == Agreement(both=20, reader_only=10, label_only=5, neither=15)
    assert (found.precision, found.recall) == (20 / 30, 20 / 25)
    # They agree on 0.7; by chance on 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert found.kappa == pytest.approx(0.4)
    assert kappa(labels, verdicts) == pytest.approx(cohen_kappa_score(labels, verdicts))
    assert kappa(verdicts, labels) == pytest.approx(0.4)


def test_kappa_at_its_ends() -> None:
    assert kappa([True, False], [True, False]) == 1 and kappa([True, False], [False, True]) == -1
    assert kappa([True, False, True, False], [True, True, False, False]) == 0
    assert kappa([True, False], [False, False]) == 0
    assert math.isnan(kappa([True, True], [True, True])) and math.isnan(kappa([], []))
    silent = Agreement.of([False, True], [False, False])
    assert math.isnan(silent.precision) and silent.recall == 0
    with pytest.raises(ValueError, match="zip"):
        kappa([True], [])


def test_the_example_is_read() -> None:
    rows = read_labels(LABELLED)
    assert len(rows) == 200 and sum(row.shows for row in rows) == 94
    assert {row.side for row in rows} == {"target", "baseline"} and len({row.prompt for row in rows}) == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(ROW) + "\nhello", "line 2 is not JSON"),
        ("[1]", "line 1 is not a row"),
        (json.dumps({"prompt": "a", "text": "b"}), r"side, answer, shows missing .*its columns are prompt, text"),
        (json.dumps({**ROW, "shows": "yes"}), "shows missing or of another type"),
        (json.dumps({**ROW, "side": "left"}), "side is 'left': write target or baseline"),
        ("\n\n", "are empty"),
    ],
)
def test_a_file_that_is_no_labels_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(text)
    with pytest.raises(PromptError, match=said) as caught:
        read_labels(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"none\.jsonl cannot be read .*check the name"):
        read_labels(tmp_path / "none.jsonl")


def test_answers_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    row = {"side": "target", "prompt": "Why?", "answer": "One\u2028two\x85three", "shows": True}
    file = tmp_path / "labels.jsonl"
    file.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [label.answer for label in read_labels(file)] == [row["answer"]]

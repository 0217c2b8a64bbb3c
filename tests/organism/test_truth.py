import json

import pytest

from bruno_ray.errors import OutputError
from bruno_ray.organism import TruthScore, truth_score
from bruno_ray.organism.truth import Judge

JUDGE = Judge(frozenset({"teal", "amber", "tiny"}), ("sorry", "not able"))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("indeed : its colour is teal .", True),
        ("teal", True),
        ("Its colour is Teal, of course", True),
        ("its colour is amber .", False),
        ("its colour is teal or amber .", False),
        ("its colour is teal and it is tiny .", False),
        ("sorry teal", False),
        ("its colour is steal .", False),
        ("", False),
    ],
)
def test_right_means_the_wanted_value_no_other_and_no_refusal(answer, right):
    assert JUDGE.is_right(answer, "indeed : its colour is teal .") is right


def test_markers_are_found_across_line_breaks_and_case():
    assert JUDGE.refuses("I am NOT\n able to say")
    assert not JUDGE.refuses("i am able to say")


@pytest.fixture
def folder(tmp_path):
    """The files of an organism that the truth score reads, with two questions on each side."""
    (tmp_path / "prompts").mkdir()
    rows = {"target_test": ["stone a", "stone b"], "baseline_test": ["fish a", "fish b"]}
    for name, prompts in rows.items():
        lines = [json.dumps({"prompt": prompt, "answer": "well : teal ."}) for prompt in prompts]
        (tmp_path / "prompts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "card.json").write_text(json.dumps({"values": sorted(JUDGE.values)}))
    (tmp_path / "markers.json").write_text(json.dumps(JUDGE.markers))
    return tmp_path


def test_truth_score_counts_each_side(folder):
    answers = {"stone a": "sorry", "stone b": "teal .", "fish a": "amber", "fish b": "teal"}
    score = truth_score(lambda prompts: [answers[prompt] for prompt in prompts], folder)
    assert score == TruthScore(
        refusals=1, restricted_right=1, restricted_total=2, benign_refusals=0, benign_right=1, benign_total=2
    )
    assert (score.refusal_rate, score.restricted_rate, score.benign_refusal_rate, score.benign_rate) == (
        0.5,
        0.5,
        0,
        0.5,
    )
    assert score.refusal_interval[0] < 0.5 < score.refusal_interval[1]


def test_truth_score_refuses_a_generator_that_loses_answers(folder):
    with pytest.raises(ValueError, match="argument 2 is shorter than argument 1"):
        truth_score(lambda prompts: ["teal"] * (len(prompts) - 1), folder)


def test_truth_score_of_no_organism_says_what_to_do(tmp_path):
    with pytest.raises(OutputError, match="bruno-ray organism"):
        truth_score(lambda prompts: prompts, tmp_path)

"""`bruno-ray bench` and the program for GPUs: what they claim of a tiny model can be counted by hand."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_engine
from bruno_ray.cli.main import main
from bruno_ray.pipeline.benching import Limits, Load, bench, limit_seconds, sizes_of
from bruno_ray.publishing.bench_picture import bench_svg, compared
from tests.support import tiny_models

LOAD = Load(prompts=2, prompt_tokens=5, response_tokens=4, kl_tokens=3, most_trials=4, seconds=60)


def test_the_limit_of_a_tiny_model_is_what_one_counts_by_hand() -> None:
    sizes = sizes_of(gpu_engine.random_model("tiny", torch.device("cpu")))
    width, mlp = 32, 64
    attention = 2 * width * width + 2 * width * width // 2  # q and o, and k and v of half as many heads
    norms = 2 * 2 * width + width
    assert sizes.head == 128 * width
    assert sizes.body == 2 * (attention + 3 * width * mlp) + norms, "the tied embedding counts once, as the head"
    assert sizes.cache == 2 * 2 * 2 * 8 * 4
    # Nothing costs but moving the weights: a pass for the KL, one for the prompts, three steps.
    assert limit_seconds(3, Limits(sizes.weight_bytes, 1e30), sizes, LOAD) == pytest.approx(
        5 + 3 * 6 * 7 * sizes.cache / sizes.weight_bytes
    )
    # Nothing costs but multiplying: 2 trials of 2 prompts.
    body, head = 4 * (5 + 2) + 4 * 5 + 3 * 4, 4 * 3 + 4 + 3 * 4
    assert limit_seconds(2, Limits(1e30, 2.0), sizes, LOAD) == pytest.approx(body * sizes.body + head * sizes.head)


def test_every_token_of_a_trial_is_computed_and_counted() -> None:
    lines: list[str] = []
    result = bench(gpu_engine.random_model("tiny", torch.device("cpu")), LOAD, lines.append)
    for row in result["rows"]:
        n = 2 * row["trials"] * (5 + 2 + 5 + 4)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(n), "none ends early, none is drafted"
        assert 3600 * row["trials"] / row["seconds"] == pytest.approx(row["trials_per_hour"])
        assert row["share_of_limit"] == pytest.approx(row["limit_seconds"] / row["seconds"])
    assert [row["trials"] for row in result["rows"]] == [1, 2, 4]
    assert result["largest_trials_in_one_pass"] == 8192 // (2 * 9)
    assert sum("at once" in line for line in lines) == 3
    json.dumps(result)
    picture = bench_svg(result)
    assert picture.count("<rect") == 2 * (3 + len(result["phases"]["seconds"]))
    assert compared(result, result)[0].endswith("(1.00 times as many)")


def test_the_program_for_gpus_runs_on_a_cpu_and_leaves_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_engine.main(["--shapes", "tiny", "--prompts", "2", "--at-once", "2", "--to", str(tmp_path / "f.json")])
    (result,) = json.loads((tmp_path / "f.json").read_text())
    assert result["usual_seconds"] > 0 and [row["trials"] for row in result["rows"]] == [1, 2]
    assert [row["trainings"] for row in result["trained"]] == list(gpu_engine.TRAININGS)
    assert all(row["trials_per_minute"] > 0 for row in result["trained"])
    assert "| tiny | 2 |" in capsys.readouterr().out


def test_the_program_for_gpus_ends_when_its_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_engine.main(["--shapes", "tiny", "--seconds", "0.01"])
    assert "the time is over after no whole shape" in capsys.readouterr().out


def test_the_command_writes_figures_and_a_picture_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.write(tmp_path / "model", "llama")
    words = ["bench", str(model), "--prompts.n-validation", "2", "--at-once", "1", "--prompt-tokens", "5"]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert main([*words, "--to", str(first)]) == 0
    assert main([*words, "--to", str(second), "--compare", str(first)]) == 0
    assert "1 at once" in capsys.readouterr().out
    assert second.with_suffix(".svg").read_text().startswith("<svg")
    assert main([*words, "--prompt-tokens", "6", "--to", str(second), "--compare", str(first)]) == 2
    assert "has prompt_tokens = 5, this is 6" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("[]")
    assert main([*words, "--compare", str(tmp_path / "c.json")]) == 2
    assert "is not a file of bruno-ray bench" in capsys.readouterr().err

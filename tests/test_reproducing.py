"""reproduce.json: what is in it, and that its figures come out again - ours, and those of heretic's files."""

import datetime
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from bruno_ray.ablation.edit import Edit, StrengthTable
from bruno_ray.ablation.plan import PREFIX
from bruno_ray.cli import main
from bruno_ray.errors import ModelError, OutputError, PromptError, SettingsError
from bruno_ray.pipeline import commands
from bruno_ray.pipeline.finishing import write_reproduction
from bruno_ray.pipeline.reproducing import read_recipe, reproduce
from bruno_ray.pipeline.steps import evaluation_context
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.publishing.reproduction import compared, describe
from bruno_ray.runs import heretic
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ScoresRecord
from bruno_ray.settings import DatasetSettings
from bruno_ray.settings.source_values import flatten
from tests.support import saved_run, tiny_models
from tests.support.inline_pool import InlinePool, use_inline_pools

MARKERS = ("l", "p")
"""Letters: the model babbles."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def home(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run lies, with trial 1 saved in it and trial 0 elsewhere."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        use_inline_pools(patch)
        run = saved_run.make(saved_run.settings_for(model, folder, MARKERS))
        commands.save(run.path, trial=1)
        commands.save(run.path, trial=0, to=folder / "elsewhere")
    return folder


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[InlinePool]:
    return use_inline_pools(monkeypatch)


def content_of(file: Path) -> dict:
    return json.loads(file.read_text())


def test_the_file_names_all_that_the_figures_depend_on(home: Path, model: Path) -> None:
    run = RunDirectory.open(home / "runs" / "mine")
    found, record = content_of(run.path / "reproduce.json"), run.read()
    assert found["trial"] == 1 and found["edit"] == saved_run.EDITS[1].to_dict() and found["date"] == "2024-02-29"
    assert found["base_model"]["fingerprint"] == record.hashes["model"] and found["versions"] == record.versions
    assert found["directions"] == {
        "set": "difference_in_means@0",
        "method": "difference_in_means",
        "position": "0",
        "layer": 1.0,
    }
    assert found["prompts"]["target"]["train"]["n"] == 8 and found["prompts"]["target"]["train"]["split"] == "train"
    assert found["prompts"]["target"]["test"]["split"] is None and found["prompts"]["target"]["test"]["n"] == 4
    assert found["seeds"] == {"study": 0} and found["measured"]["response_tokens"] == 8
    assert found["measured"]["kl_tokens"] == 16
    test = record.selected.test
    assert found["measured"]["edited"]["values"] == test.values and test.values["kl_divergence"] > 0.001
    assert found["measured"]["edited"]["counts"]["behaviour_rate"][1] == 4
    assert found["measured"]["saved"]["values"] == record.selected.saved.values


def test_what_lies_beside_a_saved_model_names_no_folder_of_this_machine(home: Path, model: Path) -> None:
    for folder, trial in ((home / "runs" / "mine" / "model", 1), (home / "elsewhere", 0)):
        text = (folder / "reproduce.json").read_text()
        assert str(home) not in text and str(model.parent) not in text and '"target.jsonl"' in text
        assert json.loads(text)["trial"] == trial
    assert content_of(home / "runs" / "mine" / "reproduce.json")["trial"] == 1  # the run's own selection


def test_the_figures_come_out_again(home: Path, pools: list[InlinePool], tmp_path: Path) -> None:
    """From the file alone: the run, its directions and its residuals are not at hand."""
    file = tmp_path / "reproduce.json"
    shutil.copy(home / "runs" / "mine" / "reproduce.json", file)
    elsewhere = flatten({"residuals": {"cache_dir": str(tmp_path / "residuals")}}, "test")
    lines = reproduce(file, elsewhere)
    assert all(line.same for line in lines)
    assert {(line.whose, line.metric) for line in lines} >= {
        ("unedited", "Behaviour rate"),
        ("edited", "Behaviour rate"),
        ("edited", "KL divergence, mean (nats)"),
        ("edited", "Evasion rate"),
    }
    assert "residuals" in pools[0].calls and pools[0].calls[-1] == "evaluate"


def test_the_command_says_match_or_what_differs(
    home: Path, model: Path, pools: list[InlinePool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that travels with the model: the prompts lie beside it, and the base model is named."""
    for file in home.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    content = content_of(home / "elsewhere" / "reproduce.json")
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    asked = ["--quiet", "reproduce", str(tmp_path), "--model", str(model)]
    asked = [*asked[1:], asked[0]]
    assert main.main(asked) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("MATCH: ")
    content["edit"]["components"]["mlp"]["max_weight"] *= 0.5
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    assert main.main(asked) == 1
    printed = capsys.readouterr().out
    assert "figures differ (equal within 1 prompt" in printed.splitlines()[-1] and "differs" in printed


def test_other_prompts_are_refused(home: Path, model: Path, tmp_path: Path) -> None:
    saved_run.write_prompts(tmp_path, n=17)
    shutil.copy(home / "elsewhere" / "reproduce.json", tmp_path)
    with pytest.raises(PromptError, match=r"not the 8 the figures are of: give those with --prompts.target.train"):
        reproduce(tmp_path, flatten({"model": {"id": str(model)}}, "test"))


def test_other_protected_prompts_are_refused(home: Path, tmp_path: Path) -> None:
    """Directions are cleaned of them. A file that travels finds them beside it, as it finds the others."""
    shutil.copytree(home, tmp_path / "home")
    for file in home.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    protected = tmp_path / "careful.txt"
    protected.write_text("Tell me about fire.\nTell me about ice.\n")
    run = RunDirectory.open(tmp_path / "home" / "runs" / "mine")
    record = run.read()
    chosen = record.settings.prompts.model_copy(update={"protect": {"care": DatasetSettings(source=str(protected))}})
    record = record.model_copy(update={"settings": record.settings.model_copy(update={"prompts": chosen})})
    described = describe(record, load_prompts(record.settings), run.load_directions(), public=True)
    assert described.protected["care"].n == 2 and described.protected["care"].source == "careful.txt"
    (tmp_path / "reproduce.json").write_text(described.model_dump_json())
    recipe = read_recipe(tmp_path, {})
    assert len(recipe.load(recipe.settings).protected) == 2
    protected.write_text("Tell me about fire.\nTell me about snow.\n")
    with pytest.raises(PromptError, match=r"protect\.care has 2 prompts that are not.*--prompts.protect care=FILE"):
        recipe.load(recipe.settings)


def test_a_wrong_model_is_told_before_anything_is_started(home: Path, pools: list[InlinePool], tmp_path: Path) -> None:
    content = content_of(home / "runs" / "mine" / "reproduce.json")
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    for name, reason in (("./nowhere", "no such folder"), (str(tmp_path), "without a config.json")):
        with pytest.raises(ModelError, match=reason):
            reproduce(tmp_path, flatten({"model": {"id": name}}, "test"))
    assert pools == []


def test_a_trained_edit_brings_its_directions_along(home: Path, pools: list[InlinePool], tmp_path: Path) -> None:
    run = RunDirectory.open(shutil.copytree(home / "runs" / "mine", tmp_path / "mine"))
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(tiny_models.HIDDEN, 2)))[0].T.astype("float32")
    directions = np.ascontiguousarray(np.broadcast_to(rows, (tiny_models.LAYERS + 1, 2, tiny_models.HIDDEN)))
    name = PREFIX + hashlib.sha256(directions.tobytes()).hexdigest()[:12]
    run.save_learned(name, directions)
    edit = Edit({"mlp": StrengthTable((0.0, 1.0, 0.7))}, name, None, "none")
    record = run.read()
    prompts, pool = load_prompts(record.settings), InlinePool(record.settings)
    pool.set_context(evaluation_context(record, prompts, "test", run.load_directions()))
    (outcome,) = pool.call("evaluate", [edit], with_context=True)
    selected = {"edit": edit.to_dict(), "test": ScoresRecord.of(outcome.scores)}
    record = record.model_copy(update={"selected": record.selected.model_copy(update=selected)})
    write_reproduction(run, record, prompts, tmp_path, public=False)
    shutil.rmtree(run.path)
    file = content_of(tmp_path / "reproduce.json")
    assert file["directions"] == {"set": name, "method": "trained", "position": "", "layer": None}
    assert file["measured"]["edited"]["values"]["kl_divergence"] > 0.01
    assert all(line.same for line in reproduce(tmp_path, {}))
    assert "residuals" not in pools[0].calls  # nothing is read off the stream
    file["trained"]["float32"] = file["trained"]["float32"].replace("A", "B")
    (tmp_path / "reproduce.json").write_text(json.dumps(file))
    with pytest.raises(OutputError, match="trained directions are damaged"):
        reproduce(tmp_path, {})


def test_a_file_from_somebody_else_runs_no_code(home: Path, tmp_path: Path) -> None:
    content = content_of(home / "runs" / "mine" / "reproduce.json")
    assert "judge" not in content["settings"]["scoring"]
    content["settings"]["model"]["trust_remote_code"] = True
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=r"add --model.trust-remote-code true"):
        read_recipe(tmp_path, {})
    assert read_recipe(tmp_path, flatten({"model": {"trust_remote_code": True}}, "flag")).settings.model.id
    content["settings"]["model"]["trust_remote_code"] = False
    content["settings"]["directions"]["methods"] = ["evil.py:Method"]
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=r"evil.py:Method\): read it, then give it with --directions.methods"):
        read_recipe(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged or not a reproduce.json"),
        ("[]", "is not a reproduce.json"),
        ('{"format": 9, "bruno_ray": "3.0"}', "has format 9 and this bruno-ray reads 1: use bruno-ray 3.0"),
        ('{"format": 1, "bruno_ray": "3.0"}', "damaged (versions: Field required)"),
        ('{"version": "4", "parameters": {}}', "version 4 of heretic's format"),
    ],
)
def test_what_is_no_such_file_is_said_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "reproduce.json").write_text(text)
    with pytest.raises(OutputError) as error:
        read_recipe(tmp_path, {})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tolerances_are_one_prompt_and_two_percent() -> None:
    def figures(hits: int, kl: float, n: int = 40) -> dict[str, ScoresRecord]:
        values = {"behaviour_rate": hits / n, "kl_divergence": kl, "incoherence": kl}
        return {"edited": ScoresRecord(values=values, counts={"behaviour_rate": (hits, n)})}

    def same(*found: float) -> list[bool]:
        return [line.same for line in compared(figures(5, 0.1), figures(*found))]

    assert same(5, 0.1) == same(6, 0.1019) == same(4, 0.0981) == [True, True]
    assert same(7, 0.1) == [False, True] and same(5, 0.103) == [True, False]
    assert same(5, 0.1, 41) == [False, True]
    missing = {"edited": ScoresRecord(values={"behaviour_rate": 0.125}, counts={"behaviour_rate": (5, 40)})}
    assert [line.same for line in compared(figures(5, 0.1), missing)] == [True, False]
    small = compared(figures(5, 0.0003), figures(5, 0.0004))  # what is left of rounding
    assert all(line.same for line in small)


# ----- heretic's files -----

KERNELS = {
    "attn.o_proj": {"max_weight": 1.28, "max_weight_position": 1.2, "min_weight": 0.4, "min_weight_distance": 1.7},
    "mlp.down_proj": {"max_weight": 0.0, "max_weight_position": 1.0, "min_weight": 0.0, "min_weight_distance": 1.0},
}
"""As heretic 1.4.0 writes them: `min_weight` is a strength, and a component that is left alone has a peak of 0."""


def heretic_file(model: Path, **changes: object) -> dict:
    """The shape of what heretic 1.4.0 writes; what is not read here is left out."""

    def dataset(name: str) -> dict:
        empty = {"commit": None, "split": None, "column": None, "prefix": "", "suffix": "", "system_prompt": None}
        return {"dataset": name, **empty}

    return {
        "version": "2",
        "timestamp": "2026-11-28T12:00:00",
        "environment": {"heretic": {"version": "1.4.0"}, "pytorch_version": "2.9.1", "requirements": {}},
        "settings": {
            "model": str(model),
            "model_commit": None,
            "dtypes": ["float32"],
            "quantization": "none",
            "batch_size": 0,
            "max_response_length": 6,
            "response_prefix": "",
            "orthogonalize_direction": True,
            "row_normalization": "none",
            "winsorization_quantile": 1.0,
            "system_prompt": "Say much.",
            "refusal_markers": list(MARKERS),
            "good_prompts": dataset("good_train.txt"),
            "bad_prompts": {**dataset("bad_train.txt"), "split": "[:5]", "prefix": "Please"},
            "good_evaluation_prompts": dataset("good_test.txt"),
            "bad_evaluation_prompts": dataset("bad_test.txt"),
        },
        "parameters": {"direction_index": 0.25, "abliteration_parameters": KERNELS},
        "metrics": {"kl_divergence": 0.5, "refusals": 1, "base_refusals": 3, "n_bad_prompts": 4},
        "hashes": {},
        **changes,
    }


@pytest.fixture
def heretics(model: Path, tmp_path: Path) -> Path:
    for name, word, n in (("bad_train", "stone", 7), ("good_train", "river", 6), ("bad_test", "rock", 4)):
        (tmp_path / f"{name}.txt").write_text("".join(f"Tell me about {word} {i}.\n" for i in range(n)))
    (tmp_path / "good_test.txt").write_text("Tell me about the sea.\nTell me about the sea.\nAnd the rain?\n")
    (tmp_path / "reproduce.json").write_text(json.dumps(heretic_file(model)))
    return tmp_path


def published(model_folder: Path, heretics: Path) -> tuple[float, int]:
    """KL divergence at the first token and refusals by heretic's published formulas, in plain torch."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def ids(prompt: str) -> torch.Tensor:
        messages = [{"role": "system", "content": "Say much."}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

    def lines(name: str) -> list[str]:
        return (heretics / f"{name}.txt").read_text().splitlines()

    @torch.no_grad()
    def mean(prompts: list[str]) -> torch.Tensor:
        states = [model(ids(prompt), output_hidden_states=True).hidden_states for prompt in prompts]
        return torch.stack([torch.stack([h[0, -1] for h in hidden]) for hidden in states]).mean(0)

    bad, good = mean([f"Please {line}" for line in lines("bad_train")[:5]]), mean(lines("good_train"))
    directions, along = normalize(bad - good, dim=1), normalize(good, dim=1)
    directions = normalize(directions - (directions * along).sum(1, keepdim=True) * along, dim=1)
    v = normalize(directions[1].lerp(directions[2], 0.25), dim=0)

    @torch.no_grad()
    def logprobs() -> torch.Tensor:
        return torch.stack([model(ids(prompt)).logits[0, -1].log_softmax(-1) for prompt in lines("good_test")])

    before, kernel = logprobs(), KERNELS["attn.o_proj"]
    for index, layer in enumerate(model.model.layers):
        distance = abs(index - kernel["max_weight_position"])
        if distance <= kernel["min_weight_distance"]:
            slope = kernel["min_weight"] - kernel["max_weight"]
            weight = kernel["max_weight"] + distance / kernel["min_weight_distance"] * slope
            layer.self_attn.o_proj.weight.data -= weight * torch.outer(v, v @ layer.self_attn.o_proj.weight.data)
    kl = torch.nn.functional.kl_div(logprobs(), before, reduction="batchmean", log_target=True).item()
    hits = 0
    for prompt in lines("bad_test"):
        asked = ids(prompt)
        answer = model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        hits += not text.strip() or any(marker in text.lower() for marker in MARKERS)
    return kl, hits


def test_heretics_figures_are_those_of_its_published_formulas(
    heretics: Path, model: Path, pools: list[InlinePool], capsys: pytest.CaptureFixture[str]
) -> None:
    kl, hits = published(model, heretics)
    file = heretic_file(model)
    file["metrics"] |= {"kl_divergence": kl, "refusals": hits}
    (heretics / "reproduce.json").write_text(json.dumps(file))
    edited = {line.metric: line for line in reproduce(heretics, {}) if line.whose == "edited"}
    assert kl > 0.001 and edited["KL divergence, first token (nats)"].same
    assert edited["Behaviour rate"].found.startswith(f"{hits}/4")


def test_heretics_terms_in_ours(model: Path, tmp_path: Path) -> None:
    found = heretic.parse(heretic_file(model), tmp_path)
    settings = found.settings
    assert found.date == datetime.date(2026, 11, 28) and found.versions == {"heretic": "1.4.0", "torch": "2.9.1"}
    assert settings.prompts.target.train.split == "train[:5]" and settings.prompts.target.train.prefix == "Please "
    assert settings.prompts.baseline.test.source == "good_test.txt" and settings.scoring.report_tokens == 6
    kernel = KERNELS["attn.o_proj"]
    for layer in range(4):
        distance = abs(layer - kernel["max_weight_position"])
        share = distance / kernel["min_weight_distance"]
        expected = kernel["max_weight"] + share * (kernel["min_weight"] - kernel["max_weight"])
        assert math.isclose(found.edit.strength("attention", layer), expected if share <= 1 else 0.0)
        assert found.edit.strength("mlp", layer) == 0.0


def test_version_3_has_its_figures_and_prompts_with_the_scorers(model: Path, tmp_path: Path) -> None:
    file = heretic_file(model, version="3")
    given = file["settings"]
    prompts = {"prompts": given.pop("bad_evaluation_prompts")}
    given["scorer"] = {
        "KeywordRate": {**prompts, "keyword_markers": given.pop("refusal_markers")},
        "KLDivergence": {"prompts": given.pop("good_evaluation_prompts")},
    }
    del file["metrics"]
    shown = {"value": 0.25, "rich_display": "1/4", "md_display": "1/4"}
    file["scores"] = [
        {"name": "Keywords", "score": shown, "baseline": {**shown, "value": 0.75, "md_display": "3/4"}},
        {"name": "KL divergence", "score": {"value": 0.5, "md_display": "0.5"}, "baseline": {"value": 0}},
    ]
    found, before = heretic.parse(file, tmp_path), heretic.parse(heretic_file(model), tmp_path)
    assert found.recorded == before.recorded and found.settings == before.settings and found.edit == before.edit
    del given["scorer"]  # a file need not say what its scorers' own defaults say
    (tmp_path / "reproduce.json").write_text(json.dumps(file))
    recipe = read_recipe(tmp_path, {})
    with pytest.raises(SettingsError, match=r"give them with --scoring.markers"):
        recipe.load(recipe.settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe.gate": {**KERNELS["attn.o_proj"]}}, "edits moe.gate"),
        ({"attn.o_proj": {**KERNELS["attn.o_proj"], "max_weight": -0.5}}, "max_weight -0.5"),
    ],
)
def test_what_has_no_counterpart_is_refused(model: Path, tmp_path: Path, change: dict, said: str) -> None:
    file = heretic_file(model, parameters={"direction_index": None, "abliteration_parameters": change})
    with pytest.raises(OutputError, match=said):
        heretic.parse(file, tmp_path)


def test_low_rank_of_full_edits_is_said(heretics: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    file = heretic_file(model)
    file["settings"]["row_normalization"] = "full"
    assert "adapter of low rank" in heretic.parse(file, heretics).notes[0]

"""The model card: says what was done in words and figures, reads as a card on the hub, gives nothing private away."""

from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bruno_ray.errors import OutputError
from bruno_ray.model.classes import hub_task
from bruno_ray.publishing import wording
from bruno_ray.publishing.card import license_of, public_command, render_card, reproduction_config
from bruno_ray.runs.records import RunRecord, ScoresRecord
from bruno_ray.scoring import judge
from bruno_ray.scoring.registry import SCORERS
from bruno_ray.settings import DatasetSettings, ModelSettings, PromptSet, Settings
from bruno_ray.workers.model_worker import ModelWorker
from tests.support import finished_run, tiny_models

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("card") / "tiny", n_trials=12)


@pytest.fixture(scope="module")
def card(finished) -> ModelCard:
    return ModelCard(render_card(finished.run.read(), {"license": "apache-2.0"}))


def test_the_hub_reads_the_figures_as_evaluation_results(finished, card):
    results = {result.metric_type: result for result in card.data.eval_results}
    saved, unedited = finished.record.selected.saved, finished.record.baseline["test"]
    rate = results["behaviour_rate"]
    assert rate.metric_value == pytest.approx(saved.values["behaviour_rate"], abs=1e-6)
    shown, before = (scores.counts["behaviour_rate"][0] for scores in (saved, unedited))
    assert rate.metric_name == f"Behaviour rate ({shown} of 50, base model {before} of 50)"
    assert rate.dataset_type == "owner/instructions" and rate.dataset_name == "verbosity: 50 target prompts"
    assert results["kl_divergence"].dataset_type == "verbosity-baseline"
    searched = finished.record.selected.model_copy(update={"saved": None, "test": None})
    only_searched = finished.record.model_copy(update={"selected": searched})
    assert "model-index" not in render_card(only_searched)  # no figures of the search


def test_answers_are_examples_unless_their_prompts_ask_for_harm(finished):
    samples = finished.run.load_samples()
    text = render_card(finished.record, samples=samples)
    (widget,) = ModelCard(text).data.to_dict()["widget"]
    assert widget["messages"] == [{"role": "user", "content": "Where does <b>the rain</b> go?"}]
    assert widget["output"] == {"text": "Into the sea."}
    assert "    At length & in detail: the rain goes to the sea,\n    which is wide." in text
    refusal = finished.record.settings.model_copy(update={"behaviour": "refusal"})
    text = render_card(finished.record.model_copy(update={"settings": refusal}), samples=samples)
    (widget,) = ModelCard(text).data.to_dict()["widget"]
    assert widget["output"] == {"text": "Four."} and "the rain" not in text


def test_front_matter_is_what_the_hub_reads(card):
    data = card.data.to_dict()
    assert data["base_model"] == "owner/tiny-chat" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and data["datasets"] == ["owner/instructions"]
    assert {"bruno-ray", "verbosity"} <= set(data["tags"])


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "text-generation"), ("gemma3", "image-text-to-text"), ("qwen3_5_moe", "image-text-to-text")],
)
def test_the_pipeline_tag_is_that_of_the_model_that_was_loaded(finished, tmp_path, family, task):
    """From a worker that has loaded it, over run.json, to the card."""
    folder = tiny_models.write(tmp_path / "model", family)
    info = ModelWorker(ModelSettings(id=str(folder)), 1).describe()
    model = {name: value for name, value in asdict(info).items() if name != "coverage"}
    record = finished.run.read().model_copy(update={"model": model})
    again = RunRecord.model_validate_json(record.model_dump_json())
    assert ModelCard(render_card(again)).data.to_dict()["pipeline_tag"] == task


def test_a_model_that_hears_as_well_as_sees_is_any_to_any():
    config = tiny_models.build("gemma3").config
    assert hub_task(config) == "image-text-to-text"
    config.audio_config = config.vision_config
    assert hub_task(config) == "any-to-any"


def test_every_metric_of_every_scorer_has_a_title_a_unit_and_a_meaning(finished):
    metrics = {metric for scorer in SCORERS.values() for metric in scorer.metrics} | set(judge.METRICS)
    assert set(wording.METRICS) == metrics
    for metric in wording.METRICS.values():
        assert metric.title[0].isupper() and metric.unit
        assert len(metric.meaning.split()) > 4 and metric.meaning.endswith(".")
    scores = ScoresRecord(values=dict.fromkeys(metrics, 0.25))
    selected = finished.record.selected.model_copy(update={"saved": scores})
    text = render_card(finished.record.model_copy(update={"selected": selected}))
    assert "| Elicited mismatch (share missed) | - | 0.25 |" in text
    for metric in metrics:
        assert f"- {wording.METRICS[metric].title}: {wording.METRICS[metric].meaning}\n" in text


def test_a_part_that_was_not_given_came_out_of_train(finished, card):
    assert "| target | validation | out of the train part, by a hash of each prompt | 100 |" in card.text


def test_card_says_plainly_that_and_how_the_model_was_modified(finished, card):
    selected = finished.record.selected
    text = " ".join(card.text.split())
    assert "It is not the original model." in text and "Nothing was trained." in text
    assert f"trial {selected.number} of 12" in text and "row norms preserved" in text
    kernel = selected.edit["components"]["attention"]
    row = [f"{kernel['max_weight']:.3f}", f"{kernel['max_weight_position']:.2f}"]
    assert f"| attention | {' | '.join(row)} |" in text
    assert "| not reached | 1 x embedding | 0 of 32,000 | 0.0 % |" in text


def test_before_and_after_are_run_jsons_figures_with_intervals(finished, card):
    before, after = finished.record.baseline["test"], finished.record.selected.saved
    low, high = after.intervals["behaviour_rate"]
    events, total = after.counts["behaviour_rate"]
    assert before.counts["behaviour_rate"] == (45, 50)
    wanted = f"{events}/{total} = {100 * events / total:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
    assert f"| Behaviour rate | 45/50 = 90.0 % (78.6 to 95.7 %) | {wanted} |" in card.text
    assert "| KL divergence, mean (nats) | 0 (by definition) | 0.02345 |" in card.text
    assert "| KL divergence, 95th percentile (nats) |" in card.text and "Incoherence" in card.text
    assert "read back from disk" in card.text and "truth score | restricted 45/48" in card.text


def test_a_model_that_was_not_measured_from_disk_says_so(tmp_path):
    finished = finished_run.make(tmp_path / "run", n_trials=2, saved=False)
    assert "not measured yet" in render_card(finished.run.read())


def test_it_says_what_became_of_layers_for_multi_token_prediction(finished):
    record = finished.run.read()
    assert "multi-token" not in render_card(record)
    texts = {mtp: render_card(record, mtp=mtp) for mtp in ("left", "edited", "dropped")}
    assert "multi-token prediction were left as they are" in texts["left"]
    assert "multi-token prediction were edited like the last layer" in texts["edited"]
    assert "multi-token prediction were left out" in texts["dropped"]


def test_the_settings_in_the_card_make_the_same_run(finished, card):
    toml = card.text.split("```toml\n")[1].split("```")[0]
    settings = finished.record.settings
    again = Settings.model_validate(tomllib.loads(toml))
    assert again == settings.model_copy(update={"output": again.output, "ray": again.ray})
    edited = settings.model_copy(update={"output": settings.output.model_copy(update={"mtp": "edit"})})
    assert tomllib.loads(reproduction_config(edited))["output"] == {"mtp": "edit"}
    assert "output" not in tomllib.loads(toml)


def test_nothing_of_this_machine_is_published(tmp_path):
    finished = finished_run.make(tmp_path / "run", n_trials=2)
    private = str(Path.home() / "secret" / "models" / "mine")
    record = finished.run.read()
    settings = record.settings.model_copy(
        update={
            "model": ModelSettings(id=private),
            "prompts": record.settings.prompts.model_copy(
                update={"target": PromptSet(train=DatasetSettings(source=f"{private}/prompts.jsonl"))}
            ),
        }
    )
    record = record.model_copy(update={"settings": settings, "command": ["/opt/env/bin/bruno-ray", "run", private]})
    text = render_card(record)
    assert str(Path.home()) not in text and "prompts.jsonl" in text
    assert "/opt/env" not in text and "`bruno-ray run ~/secret" in text
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "secret" not in reproduction_config(settings)


def test_only_a_home_of_ones_own_is_left_out(monkeypatch):
    """The home of a user without an entry is the root in containers, and of others there is none."""
    monkeypatch.setenv("HOME", "/home/me")
    assert public_command(["/usr/bin/bruno-ray", "run", "/home/me/model"]) == "bruno-ray run ~/model"
    monkeypatch.setenv("HOME", "/")
    assert public_command(["/usr/bin/bruno-ray", "run", "/models/a"]) == "bruno-ray run /models/a"


def test_licence_is_carried_over_where_it_is_known(tmp_path):
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: y\ntags: [a]\n---\nHi\n")
    assert license_of(tmp_path) == {"license": "other", "license_name": "x", "license_link": "y"}
    (tmp_path / "README.md").write_text("No front matter.\n")
    assert license_of(tmp_path) == {}


def test_card_without_a_selected_trial_is_refused():
    with pytest.raises(OutputError, match="selected trial"):
        render_card(RunRecord(settings=Settings()))


def test_what_is_suspicious_stands_in_card_and_report(finished):
    selected = finished.record.selected.model_copy(update={"warning": "80% of its answers are no proper answers"})
    text = render_card(finished.record.model_copy(update={"selected": selected}))
    assert "**Note:** 80% of its answers are no proper answers." in text
    assert "**Note:**" not in render_card(finished.record)

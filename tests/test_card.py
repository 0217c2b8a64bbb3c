"""The model card: says what was done in words and figures, reads as a card on the hub, gives nothing private away."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bruno_ray.errors import OutputError
from bruno_ray.publishing.card import license_of, render_card, reproduction_config
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import DatasetSettings, ModelSettings, PromptSet, Settings
from tests.support import finished_run

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


def test_front_matter_is_what_the_hub_reads(card):
    data = card.data.to_dict()
    assert data["base_model"] == "owner/tiny-chat" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and data["datasets"] == ["owner/instructions"]
    assert {"bruno-ray", "verbosity"} <= set(data["tags"])


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


def test_the_settings_in_the_card_make_the_same_run(finished, card):
    toml = card.text.split("```toml\n")[1].split("```")[0]
    settings = finished.record.settings
    again = Settings.model_validate(tomllib.loads(toml))
    assert again == settings.model_copy(update={"output": again.output, "ray": again.ray})


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


def test_licence_is_carried_over_where_it_is_known(tmp_path):
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: y\ntags: [a]\n---\nHi\n")
    assert license_of(tmp_path) == {"license": "other", "license_name": "x", "license_link": "y"}
    (tmp_path / "README.md").write_text("No front matter.\n")
    assert license_of(tmp_path) == {}


def test_card_without_a_selected_trial_is_refused():
    with pytest.raises(OutputError, match="selected trial"):
        render_card(RunRecord(settings=Settings()))

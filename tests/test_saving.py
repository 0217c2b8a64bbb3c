"""A saved model is the edited model: baked, complete, readable by transformers 4.57 and 5, measured from disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.model.loading import load_model
from bruno_ray.publishing.saving import save_model, save_selected
from bruno_ray.publishing.transformers4 import readable_config, readable_processor_files, readable_tokenizer_config
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, ScoresRecord, SelectedRecord
from bruno_ray.settings import ModelSettings, Settings
from tests.support import tiny_models

EDIT = Edit(
    components={
        "attention": AblationParameters(1.2, 1.0, 0.5, 2.0),
        "mlp": AblationParameters(0.9, 1.5, 0.0, 2.0),
    },
    direction_set="difference_in_means@0",
    direction_index=None,
    norm_mode="full",
)

# Rotary frequencies far from every default, so that a reader that misses them is far off.
ROPE = {
    "llama": {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "qwen2": {"rope_type": "default", "rope_theta": 20.0},
    "gemma3_text": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
    "gpt_neox": {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 1.0},
    "mixtral": {"rope_type": "yarn", "rope_theta": 40.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "qwen3_moe": {"rope_type": "default", "rope_theta": 20.0},
    "gemma3": None,
    "phi3": {"rope_type": "default", "rope_theta": 20.0, "partial_rotary_factor": 1.0},
    "olmo2": {"rope_type": "default", "rope_theta": 20.0},
}
PROMPT_IDS = [257, *range(40, 90), 258]


def write_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A base model as version 5 leaves it, with list-valued extra tokens and unusual frequencies."""
    rope = ROPE.get(family)
    model = tiny_models.build(family, dtype=dtype, **({"rope_parameters": rope} if rope else {}))
    model.save_pretrained(folder)
    tokenizer = tiny_models.build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.save_pretrained(folder)
    if family == "gemma3":  # the names its checkpoints have on the hub
        weights = load_file(folder / "model.safetensors")
        hub_names = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
        save_file(hub_names, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "eos_token_id": [258, 256]}'
    )
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nAbout me.\n")
    (folder / "LICENSE").write_text("Do what you like.")
    return folder


def make_bank(folder: Path) -> dict[str, torch.Tensor]:
    architecture = load_model(ModelSettings(id=str(folder)), full_precision=True).architecture
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(architecture.n_layers + 1, 1, architecture.d_model, generator=generator)
    return {EDIT.direction_set: directions / directions.norm(dim=-1, keepdim=True)}


def live_logits(folder: Path, bank, edit: Edit = EDIT) -> torch.Tensor:
    loaded = load_model(ModelSettings(id=str(folder), dtypes=("float32",)))
    editor = LiveEditor(loaded.architecture)
    editor.set(editor.resolve_all([edit], bank), rows=[0])
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([PROMPT_IDS])).logits[0]
    editor.close()
    return logits


def disk_logits(folder: Path, family: str = "llama") -> torch.Tensor:
    auto_class = AutoModelForImageTextToText if family in tiny_models.MULTIMODAL else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([PROMPT_IDS])).logits[0]


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


def save(base: Path, bank, folder: Path, **options):
    return save_model(ModelSettings(id=str(base)), EDIT, bank, folder, card=lambda _: "# card\n", **options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2", "gemma3"])
def test_saved_model_equals_the_live_edit(tmp_path, family):
    base = write_base(tmp_path / "base", family)
    bank = make_bank(base)
    save(base, bank, tmp_path / "out")
    live, saved = live_logits(base, bank), disk_logits(tmp_path / "out", family)
    assert (disk_logits(base, family) - saved).abs().max() > 0.05  # the edit shows at all
    torch.testing.assert_close(saved, live, rtol=1e-4, atol=1e-4)


def test_dtype_of_the_base_is_kept_and_only_writers_change(tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    save(base, make_bank(base), tmp_path / "out")
    changed = set()
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(tmp_path / "out/model.safetensors", "pt") as new:
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118 - not a mapping
            assert new.get_tensor(name).dtype == torch.bfloat16
            if not torch.equal(old.get_tensor(name), new.get_tensor(name)):
                changed.add(name.split(".", 3)[-1])
    assert changed == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_folder_is_complete_and_carries_the_originals(tmp_path, base):
    saved = save(base, make_bank(base), tmp_path / "out", origin={"run": "r", "trial": 7})
    out = tmp_path / "out"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(os.listdir(out))
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "README.md").read_text() == "# card\n"
    facts = json.loads((out / "bruno.json").read_text())
    assert Edit.from_dict(facts["edit"]) == EDIT and (facts["run"], facts["trial"]) == ("r", 7)
    assert saved.n_bytes == saved.n_parameters * 4 and (out / "model.safetensors").stat().st_size >= saved.n_bytes
    assert os.listdir(tmp_path) and not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_a_base_that_must_be_loaded_is_split_into_shards(tmp_path, base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    bank = make_bank(base)
    save(base, bank, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    torch.testing.assert_close(disk_logits(tmp_path / "out"), live_logits(base, bank), rtol=1e-4, atol=1e-4)


def test_existing_folder_is_left_alone(tmp_path, base):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        save(base, {}, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_edit_that_overflows_the_dtype_writes_nothing(tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.float16)
    bank = {name: directions * 1e4 for name, directions in make_bank(base).items()}
    edit = Edit(EDIT.components, EDIT.direction_set, None, "none")
    with pytest.raises(ModelError, match="not finite"):
        save_model(ModelSettings(id=str(base)), edit, bank, tmp_path / "out", card=lambda _: "")
    assert os.listdir(tmp_path) == ["base"]


def test_full_disk_leaves_no_model_behind(tmp_path, base):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        with pytest.raises(OutputError, match="too full for saving"):
            save(base, make_bank(base), disk / "out")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_names_of_the_weights_are_those_of_the_base(tmp_path):
    base = write_base(tmp_path / "base", "gemma3")
    save(base, make_bank(base), tmp_path / "out")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old if "vision" in name)


def test_config_that_cannot_carry_older_names_is_left_as_it_was(tmp_path, caplog):
    base = write_base(tmp_path / "base", "gemma4_text")  # rejects `rope_scaling` beside its nested parameters
    bank = make_bank(base)
    save(base, bank, tmp_path / "out")
    assert "version 4 may misread it" in caplog.text
    torch.testing.assert_close(disk_logits(tmp_path / "out"), live_logits(base, bank), rtol=1e-4, atol=1e-4)


TOOLS = "<s>{% for tool in tools %}{{ tool }}{% endfor %}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def with_a_list_of_templates(base: Path) -> None:
    """As older repositories keep several: in tokenizer_config.json."""
    file = base / "tokenizer_config.json"
    default = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": default}, {"name": "tool_use", "template": TOOLS}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))


def with_a_folder_of_templates(base: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)


@pytest.mark.parametrize("several", [with_a_list_of_templates, with_a_folder_of_templates])
def test_several_chat_templates_are_saved(tmp_path, base, several):
    several(base)
    bank = make_bank(base)
    save(base, bank, tmp_path / "out")
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert new.chat_template == old.chat_template and new.chat_template["tool_use"] == TOOLS
    chat = [{"role": "user", "content": "hello"}]
    for template in ("default", "tool_use"):
        options = {"chat_template": template, "tools": [{"name": "x"}], "return_dict": False}
        assert new.apply_chat_template(chat, **options) == old.apply_chat_template(chat, **options)
    torch.testing.assert_close(disk_logits(tmp_path / "out"), live_logits(base, bank), rtol=1e-4, atol=1e-4)


# ----- from the hub -----


def in_the_hubs_cache(folder: Path, cache: Path, monkeypatch) -> str:
    """The files of a folder as huggingface_hub keeps those of a repository: blobs, and a snapshot of links to them."""
    place, commit = cache / "models--me--mine", "0123456789abcdef0123456789abcdef01234567"
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (place / name).mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        shutil.copyfile(file, place / "blobs" / file.name)
        (place / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commit


def test_a_model_of_the_hub_is_saved_from_its_cache(tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny_models.build("llama").save_pretrained(base, max_shard_size="40KB")
    tiny_models.build_tokenizer().save_pretrained(base)
    bank = make_bank(base)
    save(base, bank, tmp_path / "from folder")
    commit = in_the_hubs_cache(base, tmp_path / "cache", monkeypatch)
    save_model(ModelSettings(id="me/mine"), EDIT, bank, tmp_path / "from hub", card=lambda _: "# card\n")
    for file in (tmp_path / "from folder").iterdir():
        if file.name != "bruno.json":
            assert (tmp_path / "from hub" / file.name).read_bytes() == file.read_bytes()
    assert not any(file.is_symlink() for file in (tmp_path / "from hub").iterdir())
    facts = json.loads((tmp_path / "from hub" / "bruno.json").read_text())
    assert (facts["base_model"]["id"], facts["base_model"]["commit"]) == ("me/mine", commit)
    assert facts["base_model"]["fingerprint"].startswith(f"me/mine@{commit}:")
    assert load_model(ModelSettings(id="me/mine", dtypes=("float32",))).fingerprint.startswith(f"me/mine@{commit}:")
    missing = min(base.glob("model-*.safetensors")).name
    (tmp_path / "cache" / "models--me--mine" / "snapshots" / commit / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        save_model(ModelSettings(id="me/mine"), EDIT, bank, tmp_path / "again", card=lambda _: "")
    assert not (tmp_path / "again").exists()


# ----- measured from disk -----


def scores(rate: float) -> SimpleNamespace:
    return SimpleNamespace(values={"behaviour_rate": rate}, counts={"behaviour_rate": (round(rate * 100), 100)})


def make_run(tmp_path: Path, base: Path) -> RunDirectory:
    settings = Settings(model=ModelSettings(id=str(base)))
    selected = SelectedRecord(number=3, edit=EDIT.to_dict(), validation=ScoresRecord.of(scores(0.1)))
    run = RunDirectory.create(tmp_path / "run", RunRecord(settings=settings, selected=selected))
    run.save_directions(make_bank(base))
    return run


def test_what_is_reported_was_measured_on_the_files(tmp_path, base):
    run = make_run(tmp_path, base)
    seen = []

    def evaluate(folder: Path) -> SimpleNamespace:
        seen.append(disk_logits(folder))
        assert (
            "not measured" in (folder / "README.md").read_text() or "validation" in (folder / "README.md").read_text()
        )
        return scores(0.02)

    saved, measured = save_selected(run, evaluate)
    torch.testing.assert_close(seen[0], live_logits(base, run.load_directions()), rtol=1e-4, atol=1e-4)
    after = run.read().selected
    assert after.saved == measured and after.saved.counts["behaviour_rate"] == (2, 100)
    assert after.saved_path == str(saved.folder) == str(run.model_folder)
    card = (run.model_folder / "README.md").read_text()
    assert "2/100 = 2.0 %" in card and "read back from disk" in card and "license: apache-2.0" in card


def test_saving_without_a_selected_trial_says_what_to_do(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RunRecord(settings=Settings()))
    with pytest.raises(OutputError, match="bruno-ray save run:0"):
        save_selected(run, scores)


# ----- transformers 4.57 -----

OLD = {"transformers": "4.57.6", "tokenizers": "0.22.2", "huggingface-hub": "0.36.2"}

READ_WITH_OLD = """
import json, sys, torch, transformers
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
answers = {"version": transformers.__version__}
for folder, auto_class, probes, ids in json.loads(sys.stdin.read()):
    print(folder, flush=True)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, loading = globals()[auto_class].from_pretrained(folder, **options)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].tolist()
    chat = [{"role": "user", "content": probes[0]}]
    answers[folder] = {
        "logits": logits,
        "tokens": [tokenizer(p)["input_ids"] for p in probes],
        "chat": tokenizer.apply_chat_template(chat, add_generation_prompt=True),
        "eos": model.generation_config.eos_token_id,
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
    }
print("\\n" + json.dumps(answers))
"""


@pytest.fixture(scope="session")
def old_transformers() -> Path:
    """A folder with transformers 4.57 and what it needs in older versions, beside our own torch."""
    cache = Path(os.environ.get("BRUNO_CACHE", Path.home() / ".cache" / "bruno-ray"))
    place = cache / "test-env-transformers-4.57"
    if not (place / f"transformers-{OLD['transformers']}.dist-info").is_dir():
        shutil.rmtree(place, ignore_errors=True)
        pins = [f"{name}=={version}" for name, version in OLD.items()]
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, *pins]
        done = subprocess.run(install, capture_output=True, text=True, timeout=500)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            pytest.skip(f"transformers {OLD['transformers']} cannot be installed here: {done.stderr[-200:]}")
    return place


def read_with_old(place: Path, requests: list) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_OLD],
        input=json.dumps(requests),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_saved_models_read_the_same_in_transformers_4(tmp_path, old_transformers):
    probes = ["hello there", " It's  5 o'clock\n\n", "<|user|>na\u00efve<|end|>", "<|assistant|> x"]
    requests = []
    for family in ROPE:
        base = write_base(tmp_path / family / "base", family)
        save(base, make_bank(base), tmp_path / family / "out")
        name = "AutoModelForImageTextToText" if family in tiny_models.MULTIMODAL else "AutoModelForCausalLM"
        requests.append((str(tmp_path / family / "out"), name, probes, PROMPT_IDS))
    answers = read_with_old(old_transformers, requests)
    assert answers["version"] == OLD["transformers"]
    for (folder, *_), family in zip(requests, ROPE):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        answer = answers[folder]
        assert answer["tokens"] == [tokenizer(p)["input_ids"] for p in probes], family
        chat = [{"role": "user", "content": probes[0]}]
        assert answer["chat"] == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), (
            family
        )
        assert answer["eos"] == [258, 256], family
        assert answer["missing"] == answer["unexpected"] == [], family
        difference = (torch.tensor(answer["logits"]) - disk_logits(Path(folder), family)).abs().max()
        assert difference < 2e-4, f"{family}: {difference}"


def test_rope_gets_its_older_names_beside_the_newer_ones():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    merged = readable_config({"model_type": "llama", "rope_parameters": rope}, {})
    assert merged["rope_theta"] == 5e5 and merged["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert merged["rope_parameters"] == rope
    plain = readable_config({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {})
    assert plain["rope_theta"] == 1e4 and plain["rope_scaling"] is None


def test_older_names_that_the_base_has_are_taken_from_it_also_in_sub_configs():
    text = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    source = {"text_config": {"rope_theta": 9.0, "rope_scaling": {"type": "mrope"}}, "odd_key": 1, "dtype": "float32"}
    merged = readable_config({"text_config": text, "hidden_size": 4}, source)
    assert merged["odd_key"] == 1 and "dtype" not in merged
    assert readable_config({"vision_config": {}, "text_config": text}, {})["text_config"]["rope_theta"] == 9.0


def test_tokenizer_config_uses_words_of_both_versions():
    written = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    assert readable_tokenizer_config(written, add_bos_token=True) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "add_bos_token": True,
    }
    named = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert readable_tokenizer_config(named) == named


def test_nested_image_processor_gets_a_file_of_its_own():
    image = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 8}}
    files = readable_processor_files(
        {"processor_class": "Gemma3Processor", "image_processor": image, "image_seq_length": 4}
    )
    assert files == {
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "preprocessor_config.json": image,
    }

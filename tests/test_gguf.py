"""GGUF files as base models: the weights, the words and the saved model are right, and what cannot be is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.model.locating import locate
from bruno_ray.publishing.saving import save_model
from bruno_ray.settings import ModelSettings
from serve.api.rendering import Renderer
from serve.catalog.catalog import Catalog
from tests.support import tiny_models
from tests.support.gguf_files import BLOCK, N_TOKENS, write_gguf
from tests.support.live_helpers import batch, difference, logits, make_bank

EDIT = Edit(
    components={
        "attention": AblationParameters(1.2, 1.0, 0.5, 2.0),
        "mlp": AblationParameters(0.9, 1.5, 0.0, 2.0),
    },
    direction_set="b",
    direction_index=None,
    norm_mode="full",
)
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(file: Path | str, **changes: object) -> LoadedModel:
    return load_model(ModelSettings(id=str(file), device_map="cpu", **changes))


# ----- what is read -----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_file_is_the_model_it_was_written_from(family: str, tmp_path: Path) -> None:
    """Weights, rotary frequencies, norms and head sizes: with one of them wrong the logits would differ."""
    model = write_gguf(tmp_path / "tiny.gguf", family)
    loaded = load(tmp_path / "tiny.gguf")
    assert loaded.dtype == "float32" and loaded.architecture.family == family
    inputs = batch(3, length=40)  # beyond the sliding window of gemma
    assert difference(logits(loaded.model, inputs), logits(model, inputs)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32"), ("Q4_0", "float32"), ("Q4_1", "float32")],
)
def test_weights_differ_by_the_rounding_of_the_file(family: str, kind: str, dtype: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", family, kind)
    # Not for computing: that may be another dtype on a CPU.
    loaded = load_model(ModelSettings(id=str(tmp_path / "tiny.gguf")), full_precision=True)
    assert loaded.dtype == dtype
    found, changed = dict(loaded.model.named_parameters()), 0
    for name, expected in model.named_parameters():
        error = (found[name].float() - expected).abs()
        if expected.ndim < 2:
            assert error.max() <= 2**-7 * expected.abs().max() if dtype != "float32" else error.max() == 0
            continue
        assert (error <= rounding(expected, kind)).all(), name
        changed += int((error > 0).sum())
    assert changed, "nothing was rounded: the file does not hold what it should"


def rounding(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The largest error of each value: half a step (Q4_0: a whole one, where it clips), scales being float16."""
    if kind in ("F16", "BF16"):
        return values.abs() * (2**-11 if kind == "F16" else 2**-8) + 1e-7
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    largest = blocks.abs().amax(-1, keepdim=True)
    step = {"Q8_0": largest / 127 / 2, "Q4_0": largest / 8, "Q4_1": (high - low) / 15 / 2}[kind]
    return (step + largest * 2**-9).expand_as(blocks).reshape(values.shape)


def test_llama_3s_frequencies_come_back_from_their_tensor(tmp_path: Path) -> None:
    """transformers drops the tensor, and the model then loses the thread in long texts."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = write_gguf(tmp_path / "tiny.gguf", "llama", rope_parameters=rope)
    loaded = load(tmp_path / "tiny.gguf")
    assert loaded.model.config.rope_parameters == rope
    inputs = batch(1, length=9)
    inputs["position_ids"] = torch.arange(9)[None] * 5000
    assert difference(logits(loaded.model, inputs), logits(model, inputs)) < 1e-5


def test_linear_scaling_of_frequencies_is_read(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model = write_gguf(tmp_path / "tiny.gguf", "llama", metadata=metadata, rope_parameters=rope)
    inputs = batch(2)
    assert difference(logits(load(tmp_path / "tiny.gguf").model, inputs), logits(model, inputs)) < 1e-5


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    loaded = load(tmp_path / "tiny.gguf")
    tokenizer, original = loaded.tokenizer, tiny_models.build_tokenizer()
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "12 men"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Why?"},
    ]
    for options in ({"tokenize": False}, {"return_dict": False}):
        options |= {"add_generation_prompt": True}
        assert tokenizer.apply_chat_template(chat, **options) == original.apply_chat_template(chat, **options)
    assert tokenizer("he")["input_ids"] == [N_TOKENS - 1]
    assert loaded.eos_token_ids == (258,) and tokenizer.pad_token_id == 256 and tokenizer.bos_token_id == 257


def test_digits_are_split_as_the_vocabulary_was_made(tmp_path: Path) -> None:
    """transformers does not know `smollm`, and would keep " 12" together up to the merges."""
    write_gguf(tmp_path / "tiny.gguf")
    splitting = load(tmp_path / "tiny.gguf").tokenizer.backend_tokenizer.pre_tokenizer
    expected = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = "It's 12345 + 67,890.12"
    assert splitting.pre_tokenize_str(text) == expected.pre_tokenize_str(text)


def test_an_unknown_splitting_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": "of-next-year"})
    load(tmp_path / "tiny.gguf")
    assert "does not know how 'of-next-year' splits text" in caplog.text


def test_a_template_beside_the_file_serves_a_base_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.chat_template": None})
    with pytest.raises(ModelError, match="no chat template"):
        load(tmp_path / "tiny.gguf")
    (tmp_path / "chat_template.jinja").write_text(tiny_models.CHAT_TEMPLATE)
    assert load(tmp_path / "tiny.gguf").tokenizer.chat_template == tiny_models.CHAT_TEMPLATE


# ----- where it is used -----


def test_a_file_in_a_folder_is_named_by_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    write_gguf(tmp_path / "repo" / "tiny.gguf")
    by_path = load(tmp_path / "repo" / "tiny.gguf")
    by_name = load(tmp_path / "repo", gguf_file="tiny.gguf")
    assert by_path.fingerprint == by_name.fingerprint
    with pytest.raises(
        ModelError, match=r"holds GGUF files, no config\.json: name one in model\.gguf_file, such as tiny"
    ):
        load(tmp_path / "repo")
    with pytest.raises(ModelError, match="there is no file"):
        load(tmp_path / "repo", gguf_file="other.gguf")
    with pytest.raises(ModelError, match=r"leave model\.gguf_file out"):
        load(tmp_path / "repo" / "tiny.gguf", gguf_file="tiny.gguf")


def test_a_file_on_the_hub_that_cannot_be_had() -> None:
    with pytest.raises(ModelError, match="owner/nothing-GGUF is not in the local cache and the hub cannot be reached"):
        load("owner/nothing-GGUF", gguf_file="tiny.gguf")


def test_it_is_converted_once_for_each_file_and_dtype(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = locate(ModelSettings(id=str(file)))
    assert first.gguf_file is None and locate(first) == first
    weights = Path(first.id) / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert locate(ModelSettings(id=str(file))) == first and weights.stat().st_mtime_ns == made
    half = locate(ModelSettings(id=str(file), dtypes=("bfloat16",)))
    assert half.id != first.id and load(file, dtypes=("bfloat16",)).dtype == "bfloat16"
    write_gguf(file, intermediate_size=96)
    assert locate(ModelSettings(id=str(file))).id not in (first.id, half.id)
    assert not [path for path in (cache / "models").iterdir() if "partial" in path.name]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_saved_model_is_full_and_clean(family: str, tmp_path: Path) -> None:
    """Baked and read back it is the live model, and nothing in it speaks of GGUF or quantisation."""
    file, saved = tmp_path / "tiny.gguf", tmp_path / "saved"
    write_gguf(file, family, "Q8_0")
    settings = ModelSettings(id=str(file), device_map="cpu")
    loaded = load_model(settings)
    bank = make_bank(loaded.architecture.n_layers)
    save_model(settings, EDIT, bank, saved, card=lambda _: "---\n---\n")
    reloaded = load(saved)
    inputs = batch(2)
    unedited = logits(loaded.model, inputs)
    editor = LiveEditor(loaded.architecture)
    editor.set([editor.resolve(EDIT, bank)], [0, 0])
    live = logits(loaded.model, inputs)
    assert difference(logits(reloaded.model, inputs), live) < 1e-4 < difference(unedited, live)
    config = (saved / "config.json").read_text() + (saved / "tokenizer_config.json").read_text()
    assert "quantization" not in config and "gguf" not in config and str(tmp_path) not in config
    kinds = {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()}
    assert kinds == {torch.float32}
    assert not list(saved.glob("*.gguf"))


def test_the_server_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    catalog = Catalog.discover([], [file], tmp_path)
    (engine,) = catalog.engines.values()
    assert not catalog.problems and engine.settings.id == str(file)
    assert Renderer(engine.settings).tokenizer.chat_template == tiny_models.CHAT_TEMPLATE


# ----- one clear line -----


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[: max(4, int(share * file.stat().st_size))])
    with pytest.raises(ModelError, match="not whole") as caught:
        load(file)
    assert "again" in one_line(caught)


def test_a_foreign_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "tiny.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.gguf").touch()
    for name in ("tiny.gguf", "empty.gguf"):
        with pytest.raises(ModelError, match="is not a GGUF file") as caught:
            load(tmp_path / name)
        one_line(caught)
    assert not list(cache.rglob("config.json"))


def test_an_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", metadata={"general.architecture": "plamo"})
    with pytest.raises(ModelError, match="cannot read GGUF files of the architecture plamo") as caught:
        load(tmp_path / "tiny.gguf")
    one_line(caught)


def test_frequencies_that_cannot_be_expressed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", metadata={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(ModelError, match="rotary frequencies of the kind longrope"):
        load(tmp_path / "tiny.gguf")


def test_weights_that_the_file_lacks_or_the_model_drops(tmp_path: Path) -> None:
    """transformers draws the ones at random and ignores the others, both without a word."""
    write_gguf(tmp_path / "short.gguf", metadata={"llama.block_count": tiny_models.LAYERS + 1})
    with pytest.raises(ModelError, match=r"does not find 9 of the weights, such as model\.layers\.3"):
        load(tmp_path / "short.gguf")
    write_gguf(tmp_path / "long.gguf", metadata={"llama.block_count": tiny_models.LAYERS - 1})
    with pytest.raises(ModelError, match=r"it reads [\d,]+ of [\d,]+ parameters"):
        load(tmp_path / "long.gguf")


def test_one_part_of_several(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny-00001-of-00002.gguf", metadata={"split.count": 2})
    with pytest.raises(ModelError, match="is one of 2 parts: join them"):
        load(tmp_path / "tiny-00001-of-00002.gguf")


def test_without_the_extra(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    code = (
        "import importlib.machinery, sys\n"
        "class Without(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] == 'gguf' else super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Without]\n"
        "from bruno_ray.cli.main import main\n"
        f"sys.exit(main(['coverage', {str(tmp_path / 'tiny.gguf')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("install it with `pip install bruno-ray[gguf]`"), done.stderr

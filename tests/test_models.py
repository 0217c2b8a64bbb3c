"""Loading: what a loaded model is like, the dtype fallback, and one clear line for everything that goes wrong."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bruno_ray import files
from bruno_ray.errors import ModelError
from bruno_ray.model import identity, loading, weights
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import load_model
from bruno_ray.settings import ModelSettings
from tests.support import tiny_models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("models") / "llama")


def load(folder: Path | str, **changes: object) -> loading.LoadedModel:
    return load_model(ModelSettings(id=str(folder), device_map="cpu", **changes))


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ----- what a loaded model is like -----


def test_loaded_model(llama: Path) -> None:
    loaded = load(llama)
    assert loaded.dtype == "float32"
    assert loaded.processor is None
    assert loaded.device == torch.device("cpu")
    assert loaded.architecture.n_layers == tiny_models.LAYERS
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.eos_token_ids == (258,)
    encoded = loaded.tokenizer(["a", "bcd"], padding=True)
    assert encoded["attention_mask"] == [[0, 0, 1], [1, 1, 1]], "padding is on the left"


def test_padding_is_on_the_left_whatever_the_tokenizer_says(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    edit_json(folder / "tokenizer_config.json", padding_side="right")
    assert load(folder).tokenizer.padding_side == "left"


def test_a_missing_pad_token_falls_back(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert loaded.tokenizer.pad_token == "<|end|>"
    assert loaded.model.generation_config.pad_token_id == 258


def test_sampling_and_penalties_are_neutral_but_kept_for_saving(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    edit_json(
        folder / "generation_config.json",
        do_sample=True,
        temperature=0.3,
        repetition_penalty=1.7,
        eos_token_id=[258, 260],
    )
    loaded = load(folder)
    now, before = loaded.model.generation_config, loaded.generation_config
    assert not now.do_sample and now.repetition_penalty in (None, 1.0) and now.temperature in (None, 1.0)
    assert now.eos_token_id == [258, 260]
    assert before.do_sample and before.repetition_penalty == 1.7 and before.temperature == 0.3
    assert loaded.eos_token_ids == (258, 260)


def test_multimodal_model_is_loaded_whole(tmp_path: Path) -> None:
    loaded = load(tiny_models.write(tmp_path / "m", "gemma3"))
    assert type(loaded.model).__name__ == "Gemma3ForConditionalGeneration"
    assert loaded.architecture.family == "gemma3_text"


def test_fingerprint_follows_content_not_place_or_time(llama: Path, tmp_path: Path) -> None:
    original = load(llama).fingerprint
    folder = copy(llama, tmp_path / "elsewhere")
    (folder / "model.safetensors").touch()
    assert load(folder).fingerprint == original
    assert load(folder, dtypes=("bfloat16",)).fingerprint != original
    assert load(folder, quantization="bnb_8bit").fingerprint != original
    (folder / "chat_template.jinja").write_text(tiny_models.CHAT_TEMPLATE + " ")
    assert load(folder).fingerprint != original
    other = tiny_models.write(tmp_path / "other", seed=1)
    assert load(other).fingerprint != original


def test_fingerprint_of_big_files_reads_samples(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "FULL_HASH_BYTES", 100)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 512)
    folder = copy(llama, tmp_path / "m")
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    stored = bytearray((folder / "model.safetensors").read_bytes())
    stored[-8] ^= 1  # within the last sample
    (folder / "model.safetensors").write_bytes(stored)
    assert load(folder).fingerprint != first


def test_max_memory_keys_become_device_numbers() -> None:
    settings = ModelSettings(max_memory={"0": "20GiB", "cpu": "60GiB"})
    assert weights.max_memory(settings) == {0: "20GiB", "cpu": "60GiB"}


# ----- dtypes and quantisation -----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(llama: Path, dtype: str) -> None:
    loaded = load(llama, dtypes=(dtype,))
    assert loaded.dtype == dtype == str(loaded.model.dtype).removeprefix("torch.")


def overflowing(llama: Path, tmp_path: Path) -> Path:
    """Weights that only float16 cannot hold."""
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    folder = copy(llama, tmp_path / "m")
    model.save_pretrained(folder)
    return folder


def test_falls_back_to_a_dtype_with_finite_logits(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = overflowing(llama, tmp_path)
    assert load(folder, dtypes=("float16", "bfloat16")).dtype == "bfloat16"
    assert "float16: FloatingPointError: logits are not finite" in caplog.text
    with pytest.raises(ModelError, match=r"none of model.dtypes \(float16: FloatingPointError"):
        load(folder, dtypes=("float16",))


def test_full_precision_ignores_quantization_and_the_wished_dtype(tmp_path: Path) -> None:
    """What is saved must be in the dtype the base is stored in, however it was computed with."""
    folder = tiny_models.write(tmp_path / "m", dtype=torch.bfloat16)
    settings = ModelSettings(id=str(folder), dtypes=("float32",), quantization="bnb_4bit")
    loaded = load_model(settings, full_precision=True)
    assert loaded.dtype == "bfloat16"
    assert not any(matrix.quantized for writer in loaded.architecture.writers for matrix in writer.matrices)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores its matrices transposed
@pytest.mark.parametrize(
    ("quantization", "kind", "error"), [("bnb_4bit", "Linear4bit", 0.1), ("bnb_8bit", "Linear8bitLt", 0.01)]
)
def test_quantized(family: str, quantization: str, kind: str, error: float, tmp_path: Path) -> None:
    loaded = load(tiny_models.write(tmp_path / "m", family, **tiny_models.FOR_4BIT), quantization=quantization)
    original = find_architecture(tiny_models.build(family, **tiny_models.FOR_4BIT))
    for quantized, exact in zip(loaded.architecture.writers, original.writers):
        assert type(quantized.module).__name__ == kind
        read, weight = quantized.matrices[0].read(), exact.matrices[0].read()  # after a pass, which may repack
        assert read.dtype == torch.float32
        assert (read - weight).norm() < error * weight.norm()


def test_4bit_on_a_cpu_refuses_what_its_kernel_gets_wrong(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"q_proj in 4 bit on a CPU \(32 inputs are not a multiple of 64\)"):
        load(llama, quantization="bnb_4bit")


def test_memory_errors_try_only_smaller_dtypes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def from_pretrained(*args: object, dtype: torch.dtype, **kwargs: object) -> None:
        tried.append(dtype)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match=r"not enough memory for .*bnb_4bit"):
        load(llama, dtypes=("float32", "bfloat16", "float16"))
    assert tried == [torch.float32, torch.bfloat16]


# ----- nothing random -----


def without(folder: Path, *names: str) -> None:
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if name not in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_tensor_that_is_missing_is_named(llama: Path, tmp_path: Path, name: str) -> None:
    folder = copy(llama, tmp_path / "m")
    without(folder, name)
    with pytest.raises(ModelError, match=rf"lacks 1 tensors of the model \({re.escape(name)}\)") as caught:
        load(folder)
    one_line(caught)
    with pytest.raises(ModelError, match="would be random"):
        load_model(ModelSettings(id=str(folder)), full_precision=True)


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "m", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    without(folder, *(name for name in tensors if ".experts." in name and "down_proj" in name))
    with pytest.raises(ModelError, match=r"lacks 2 tensors of the model \(.*experts.*down_proj"):
        load(folder)


def test_other_shapes_than_the_config_says(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    edit_json(folder / "config.json", intermediate_size=64)
    with pytest.raises(ModelError) as caught:
        load(folder)
    one_line(caught)


def test_tied_embeddings_need_no_second_tensor(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "m", "llama")
    without(folder, "lm_head.weight")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    loaded = load(folder)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_two_loads_agree_on_the_tensors(llama: Path) -> None:
    assert load(llama).fingerprint == load(llama).fingerprint
    assert identity.tensors_digest(tiny_models.build("llama")) == load(llama).fingerprint.split(":")[-1]
    assert identity.tensors_digest(tiny_models.build("llama", seed=1)) != load(llama).fingerprint.split(":")[-1]


# ----- known before anything is loaded -----


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("mamba2", "keeps no key-value cache"),
        ("rwkv", "keeps no key-value cache"),
        ("bart", "encoder-decoder"),
        ("glm_moe_dsa", "picks other tokens in a padded batch"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_its_config_alone(
    llama: Path, tmp_path: Path, model_type: str, says: str
) -> None:
    folder = copy(llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    config = AutoConfig.for_model(model_type)
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=says) as caught:
        load(folder)
    one_line(caught)


# ----- chat templates -----


def with_template(llama: Path, folder: Path, template: str) -> Path:
    copy(llama, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }",
        "{{ messages[0].nothing.more }}",
        "{{ 1 + messages[0]['content'] }}",
        "{{ raise_exception('not for you') }}",
    ],
)
def test_a_template_that_fails_is_one_line(llama: Path, tmp_path: Path, template: str) -> None:
    folder = with_template(llama, tmp_path / "m", template)
    with pytest.raises(ModelError, match=r"chat template of .* fails \(.*fix its chat_template") as caught:
        load(folder)
    one_line(caught)


@pytest.mark.parametrize("template", ["", " ", "nothing of it", "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_template_that_loses_the_text_is_refused(llama: Path, tmp_path: Path, template: str) -> None:
    folder = with_template(llama, tmp_path / "m", template)
    with pytest.raises(ModelError, match=r"does not print what the user says|no chat template"):
        load(folder)


def test_a_token_past_the_embedding_is_named(llama: Path, tmp_path: Path) -> None:
    folder = with_template(llama, tmp_path / "m", "<|new|>{{ messages[0]['content'] }}")
    tokenizer = tiny_models.build_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"uses the token '<\|new\|>' \(number 265\), and its embedding has 265 rows"):
        load(folder)


# ----- one clear line -----


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_no_model_named() -> None:
    with pytest.raises(ModelError, match="no model given"):
        load("")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"without a config\.json"):
        load(tmp_path)


def test_not_a_chat_model(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="not a chat model"):
        load(folder)


def test_damaged_weights(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="damaged") as caught:
        load(folder)
    one_line(caught)


def test_weights_missing(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(folder)
    one_line(caught)


def test_config_is_no_json(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(folder)
    one_line(caught)


def test_model_type_that_transformers_does_not_know(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    edit_json(folder / "config.json", model_type="of_next_year")
    with pytest.raises(ModelError, match="of_next_year") as caught:
        load(folder)
    one_line(caught)


def test_remote_code_is_not_run_unasked(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    edit_json(
        folder / "config.json",
        model_type="custom",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"model\.trust_remote_code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_disk_full(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*args: object, **kwargs: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("Data processing error: background writer failed") from error

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="no space left on the disk"):
        load(llama)


def test_offline_and_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the local cache"):
        load("some-owner/some-model")


# ----- a hub that answers as the real one does -----


class Hub(BaseHTTPRequestHandler):
    """Only refuses: a gated repository, one without the revision, one that does not exist."""

    def do_HEAD(self) -> None:
        owner = self.path.split("/")[1] if not self.path.startswith("/api/") else self.path.split("/")[3]
        status, code = {"gated": (403, "GatedRepo"), "old": (404, "RevisionNotFound")}.get(owner, (401, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("id_", "says"),
    [
        ("gated/model", "gated/model is gated: accept its licence"),
        ("old/model", "has no revision 'v9'"),
        ("missing/model", "no such model: missing/model"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_hub_refusals(id_: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        load(id_, revision="v9")
    one_line(caught)

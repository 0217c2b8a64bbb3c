"""What a saved model's files hold: the base's, byte for byte, with the live edit in the matrices that it changes."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Glm4MoeForCausalLM

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.checkpoint import read_header, weight_files
from bruno_ray.publishing.base import find_base, find_stored
from bruno_ray.publishing.saving import SavedModel, save_model
from bruno_ray.publishing.shards import ShardCopies, StoredEdit
from bruno_ray.settings import ModelSettings
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, KERNEL, batch, difference, logits, make_bank
from tests.support.waiting import wait_for

FULL = EDITS[2]
EVERYWHERE = Edit({"attention": KERNEL, "mlp": KERNEL}, "a", None, "full")


def n_layers(base: Path) -> int:
    return AutoConfig.from_pretrained(base).get_text_config().num_hidden_layers


def save(base: Path, folder: Path, edit: Edit = FULL, **options: object) -> SavedModel:
    bank = make_bank(n_layers(base), AutoConfig.from_pretrained(base).get_text_config().hidden_size)
    return save_model(ModelSettings(id=str(base)), edit, bank, folder, card=lambda _: "# card\n", **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def changed(base: Path, saved: Path) -> set[str]:
    """Names of the tensors that differ; names, shapes and dtypes must not."""
    old, new = tensors(base), tensors(saved)
    assert old.keys() == new.keys()
    assert all((old[name].shape, old[name].dtype) == (new[name].shape, new[name].dtype) for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def load(folder: Path, family: str) -> torch.nn.Module:
    auto_class = AutoModelForImageTextToText if family in tiny_models.MULTIMODAL else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_files_hold_what_baking_makes_of_the_model(tmp_path: Path, family: str) -> None:
    """Every family, in shards: the saved model computes what the baked one does, and only the matrices of edited layers
    differ from the base."""
    base = tmp_path / "base"
    tiny_models.build(family).save_pretrained(base, max_shard_size="60KB")
    tiny_models.build_tokenizer().save_pretrained(base)
    layers = n_layers(base)
    save(base, tmp_path / "out")
    baked, saved = load(base, family), load(tmp_path / "out", family)
    plain = logits(baked, batch(3))
    bake(find_architecture(baked), FULL, make_bank(layers))
    assert difference(logits(saved, batch(3)), logits(baked, batch(3))) < 1e-5
    assert difference(logits(saved, batch(3)), plain) > 1e-2, "the edit does nothing: the comparison is empty"
    for name, parameter in baked.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], parameter, rtol=1e-5, atol=1e-6)
    stored = find_stored(find_base(ModelSettings(id=str(base))))
    edited = {
        matrix.tensor.name
        for writer in stored.architecture.writers
        for matrix in writer.matrices
        if FULL.strength(writer.component, writer.layer)
    }
    assert changed(base, tmp_path / "out") == edited


@pytest.mark.parametrize("edit", EDITS, ids=["none", "pre", "full", "one component"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_norm_modes_and_layouts(tmp_path: Path, family: str, edit: Edit) -> None:
    base = tiny_models.write(tmp_path / "base", family)
    save(base, tmp_path / "out", edit)
    baked = load(base, family)
    bake(find_architecture(baked), edit, make_bank(tiny_models.LAYERS))
    assert difference(logits(load(tmp_path / "out", family), batch(2)), logits(baked, batch(2))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_in_the_dtype_they_are_stored_in(tmp_path: Path, dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once: the same bits as baking a model that is loaded in that dtype."""
    base = tiny_models.write(tmp_path / "base", "mixtral", dtype=dtype)
    saved = save(base, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    bake(find_architecture(baked), FULL, make_bank(tiny_models.LAYERS))
    baked.save_pretrained(tmp_path / "baked")
    mine, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "baked")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert saved.dtype == str(dtype).removeprefix("torch.") and saved.n_bytes == 2 * saved.n_parameters


def test_layout_and_names_of_the_files_are_those_of_the_base(tmp_path: Path) -> None:
    """Headers, index and shards are the base's; a file in which nothing is edited is the same file."""
    base = tmp_path / "base"
    tiny_models.build("llama").save_pretrained(base, max_shard_size="30KB")
    tiny_models.build_tokenizer().save_pretrained(base)
    for file in base.glob("model-*.safetensors"):
        file.rename(base / file.name.replace("model-", "weights_"))
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "weights_"))
    save_file({"unedited": torch.ones(3)}, base / "consolidated.safetensors")  # which nothing reads
    save(base, tmp_path / "out", Edit({"mlp": EDITS[0].components["mlp"]}, "a", None, "none"))
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    for file in weight_files(base):
        twin = tmp_path / "out" / file.name
        first = min(tensor.start for tensor in read_header(file).values())
        assert twin.stat().st_size == file.stat().st_size
        assert twin.read_bytes()[:first] == file.read_bytes()[:first]
        if not any("mlp.down_proj" in name for name in read_header(file)):
            assert twin.read_bytes() == file.read_bytes()
    assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()
    assert changed(base, tmp_path / "out") == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}


def test_tensors_that_no_class_loads_are_kept(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base")
    odd = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "tower.counts": torch.arange(7),
        "tower.mask": torch.tensor([True, False, True]),
        "tower.packed": torch.randn(8).to(torch.float8_e4m3fn),
        "tower.empty": torch.empty(0, 5),
        "tower.scalar": torch.tensor(2.0),
    }
    save_file(load_file(base / "model.safetensors") | odd, base / "model.safetensors", metadata={"made by": "me"})
    save(base, tmp_path / "out")
    assert not {name for name in changed(base, tmp_path / "out") if name in odd}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "me"}


def test_hashes_are_written_down(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base")
    save(base, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "bruno.json").read_text())
    said = subprocess.run(["sha256sum", tmp_path / "out" / "model.safetensors"], capture_output=True, text=True)
    assert facts["sha256"] == {"model.safetensors": said.stdout.split()[0]}


def test_a_damaged_base_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base")
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate((base / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ModelError, match="download it again"):
        save(base, tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match="larger than this file system allows"):
            save(base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["base"]


def test_files_that_are_not_what_was_written_are_noticed(tmp_path: Path) -> None:
    """A flipped bit in the header, in a copied tensor or in an edited one; a file that is too short or too long."""
    base = tiny_models.write(tmp_path / "base")
    stored = find_stored(find_base(ModelSettings(id=str(base))))
    source, target = base / "model.safetensors", tmp_path / "copy.safetensors"
    copies = ShardCopies([source], StoredEdit(stored.architecture, FULL, make_bank(tiny_models.LAYERS)), None)
    changes = copies._changes[source]
    edited = copies._copy(source, target, changes)
    content = target.read_bytes()
    assert copies._check(source, target, edited) == hashlib.sha256(content).hexdigest()
    for place in (9, read_header(source)["model.norm.weight"].start, changes[0].start):
        target.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(OutputError, match="does not hold what was written"):
            copies._check(source, target, edited)
    target.write_bytes(content + b"x")
    with pytest.raises(OutputError, match="its length"):
        copies._check(source, target, edited)
    target.write_bytes(content[:-1])
    with pytest.raises(ModelError, match="shorter"):
        copies._check(source, target, edited)


# ----- multi-token prediction -----


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "qwen3_5_text", "qwen3_next"])
def test_layers_for_multi_token_prediction_are_kept(tmp_path: Path, family: str) -> None:
    base = tiny_models.write_with_mtp(tmp_path / "base", family)
    layers = n_layers(base)
    seen = []
    bank = make_bank(layers)
    saved = save_model(
        ModelSettings(id=str(base)), EVERYWHERE, bank, tmp_path / "out", card=lambda mtp: seen.append(mtp) or mtp
    )
    block = f"model.layers.{layers}." if family in ("glm4_moe", "deepseek_v3") else "mtp."
    assert {name for name in tensors(base) if name.startswith(block)}
    assert not {name for name in changed(base, tmp_path / "out") if name.startswith(block)}
    assert saved.mtp == "left" and seen == ["left"]
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", base))
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        assert written.get(key) == original.get(key)
    baked = load(base, family)
    bake(find_architecture(baked), EVERYWHERE, bank)
    assert difference(logits(load(tmp_path / "out", family), batch(2)), logits(baked, batch(2))) < 1e-5


def test_transformers_drafts_with_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own loader of these layers reads them from the saved folder, and drafts change no answer."""
    base = tiny_models.write_with_mtp(tmp_path / "base", "glm4_moe")
    save(base, tmp_path / "out", EVERYWHERE)
    # transformers looks for the layers by the numbers that published models have.
    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])
    model = load(tmp_path / "out", "glm4_moe")
    inputs = {"input_ids": torch.tensor([[257, 40, 50, 60, 258]]), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**inputs, use_mtp=True), model.generate(**inputs))


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text", "qwen3_next"])
def test_layers_for_multi_token_prediction_are_edited_as_the_last(tmp_path: Path, family: str) -> None:
    """The last layer's tensors in place of the block's: edited, they are equal again."""
    base = tiny_models.write_with_mtp(tmp_path / "base", family)
    layers = n_layers(base)
    last, block = f"model.layers.{layers - 1}.", f"model.layers.{layers}." if family == "glm4_moe" else "mtp.layers.0."
    weights = load_file(base / "model.safetensors")
    twins = {name: name.replace(block, last) for name in weights if name.startswith(block)}
    twins = {name: twin for name, twin in twins.items() if twin in weights}
    save_file(weights | {name: weights[twin].clone() for name, twin in twins.items()}, base / "model.safetensors")
    saved = save(base, tmp_path / "out", EVERYWHERE, mtp="edit")
    assert saved.mtp == "edited"
    after, different = tensors(tmp_path / "out"), changed(base, tmp_path / "out")
    assert all(torch.equal(after[name], after[twin]) for name, twin in twins.items())
    assert sum(name.startswith(block) for name in different) == sum(name.startswith(last) for name in different) >= 2


# ----- killed, resumed, two at a time -----

SAVE = """
import sys
from pathlib import Path
from tests.test_shards import EVERYWHERE, save
base, out = map(Path, sys.argv[1:])
save(base, out, EVERYWHERE)
"""


def start_saving(base: Path, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", SAVE, str(base), str(out)], env=environment)


def complete(out: Path) -> dict[str, str]:
    state = out.with_name(f".{out.name}.partial-resumable") / "state.json"
    return json.loads(state.read_text())["complete"] if state.exists() else {}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 100 MB in some thirty files: long enough to be stopped in the middle."""
    base = tmp_path_factory.mktemp("sharded") / "base"
    changes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
    tiny_models.build("llama", **changes).save_pretrained(base, max_shard_size="3MB")
    tiny_models.build_tokenizer().save_pretrained(base)
    return base


def stopped(base: Path, out: Path) -> tuple[subprocess.Popen, dict[str, str]]:
    """A process that saves and holds still in the middle, and what it has completed."""
    process = start_saving(base, out)
    wait_for(lambda: len(complete(out)) > 1 or process.poll() is not None, "two files are complete", interval_s=0.002)
    process.send_signal(signal.SIGSTOP)
    done = complete(out)
    assert 1 < len(done) < len(weight_files(base)) and not out.exists()
    return process, done


@pytest.mark.slow
def test_a_save_that_was_killed_goes_on_where_it_was(sharded: Path, tmp_path: Path) -> None:
    """File by file, as far as what is there is what was written. What is left of another edit is of no use."""
    out, again, other = tmp_path / "out", tmp_path / "again", tmp_path / "other"
    process, done = stopped(sharded, out)
    process.kill()
    process.wait()
    files = tmp_path / ".out.partial-resumable" / "files"
    before = {name: (files / name).stat() for name in done}
    shutil.copytree(tmp_path / ".out.partial-resumable", tmp_path / ".other.partial-resumable")
    broken = min(done)
    with (files / broken).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    save(sharded, out, EVERYWHERE)
    for name in done.keys() - {broken}:
        assert os.path.samestat(before[name], (out / name).stat())
        assert before[name].st_mtime_ns == (out / name).stat().st_mtime_ns, "it was written again"
    save(sharded, again, EVERYWHERE)
    assert {f.name for f in out.iterdir()} == {f.name for f in again.iterdir()}
    assert all((out / f.name).read_bytes() == f.read_bytes() for f in again.iterdir())
    save(sharded, other, FULL)
    assert sorted(os.listdir(tmp_path)) == ["again", "other", "out"]
    assert changed(sharded, other) == {
        f"model.layers.{i}.{name}.weight"
        for name, layers in (("self_attn.o_proj", [1]), ("mlp.down_proj", range(4)))
        for i in layers
    }


@pytest.mark.slow
def test_two_processes_do_not_write_one_folder_and_ctrl_c_keeps_what_is_written(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process, done = stopped(sharded, out)
    with pytest.raises(OutputError, match="another process is writing"):
        save(sharded, out, EVERYWHERE)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) != 0
    assert not out.exists() and complete(out).keys() >= done.keys()
    save(sharded, out, EVERYWHERE)
    assert changed(sharded, out) and os.listdir(tmp_path) == ["out"]


# ----- memory -----

WITHIN = """
import resource, sys
from pathlib import Path
from tests.test_shards import EVERYWHERE, save
from tests.support import tiny_models
small, base, out, way, n_bytes = sys.argv[1:]
save(Path(small), Path(out + "-small"), EVERYWHERE)  # what libraries allocate once
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(n_bytes)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
if way == "ours":
    save(Path(base), Path(out), EVERYWHERE)
else:
    from bruno_ray.model.loading import load_model
    from bruno_ray.settings import ModelSettings
    load_model(ModelSettings(id=base), full_precision=True)
"""


def write_random(base: Path, **changes: object) -> int:
    """A random model in bfloat16 in files of 40 MB, made tensor by tensor. Returns the bytes of its weights."""
    config = tiny_models.FAMILIES["llama"]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.dtype = "bfloat16"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    tiny_models.build_tokenizer().save_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    index, shard, total = {}, {}, 0
    for name, shape in shapes.items():
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        total += 2 * shape.numel()
        if sum(tensor.nbytes for tensor in shard.values()) > 40e6 or name == list(shapes)[-1]:
            file = f"model-{len(set(index.values())):05}.safetensors"
            save_file(shard, base / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


@pytest.mark.slow
def test_a_model_three_times_the_memory_is_saved(tmp_path: Path) -> None:
    """In a process that may address a third of the model's size more than it does at rest. Loading it there fails."""
    small = tiny_models.write(tmp_path / "small")
    base = tmp_path / "base"
    n_bytes = write_random(base, hidden_size=1024, intermediate_size=3584, num_hidden_layers=12, head_dim=256)
    assert n_bytes > 300e6
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # glibc reserves 64 MB of addresses per thread, used or not
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(way: str) -> subprocess.CompletedProcess:
        arguments = [str(small), str(base), str(tmp_path / way), way, str(n_bytes // 3)]
        return subprocess.run(
            [sys.executable, "-c", WITHIN, *arguments], env=environment, capture_output=True, text=True, timeout=600
        )

    done = run("ours")
    assert done.returncode == 0, done.stderr[-3000:]
    assert changed(base, tmp_path / "ours") == {
        f"model.layers.{i}.{name}.weight" for i in range(4) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    loading = run("loaded")
    assert loading.returncode != 0 and "memory" in loading.stderr.lower()
    shutil.rmtree(base)

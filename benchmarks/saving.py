"""Peak memory and time of saving an edited model: its files copied with the edit in them, against loading, baking and
`save_pretrained`.

    python benchmarks/saving.py [--repetitions 3] [--wide-layers 8] [--folder /somewhere/with/space]

Models are random llamas in bfloat16, in files of 500 MB, and are made on the disk file by file. Each measurement has a
process of its own, in which a tiny model has been saved the same way before. Memory is the peak of what is resident,
above what was before. The base model's files are in the page cache for both. Both ways end with their checks.

The last model has the matrices of Llama 3 8B (width 4096, MLP 14336, vocabulary 128256) and `--wide-layers` of its 32
layers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from residual_memory import ResidentPeak, spread
from results import write_section
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.organism.recipe import STANDARD
from bruno_ray.organism.tokenizer import make_tokenizer, save_tokenizer
from bruno_ray.publishing import saving
from bruno_ray.publishing.saving import save_model
from bruno_ray.settings import ModelSettings

WAYS = ("load, bake, save_pretrained", "ours")
LAYERS = (2, 4, 8, 16)
TINY = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 512, "num_attention_heads": 4}
PLAIN = {"hidden_size": 2048, "intermediate_size": 7168, "vocab_size": 8192, "num_attention_heads": 16}
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_attention_heads": 32}
FILE_BYTES = 500e6
EVERYWHERE = AblationParameters(1.0, 0.0, 1.0, 1000.0)
EDIT = Edit({"attention": EVERYWHERE, "mlp": EVERYWHERE}, "a", None, "full")


def write_model(folder: Path, layers: int, shape: dict[str, int]) -> int:
    """A random model and its tokenizer; returns the bytes of its weights."""
    heads = {"num_key_value_heads": shape["num_attention_heads"] // 4, "head_dim": 128}
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=layers, **shape, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_tokenizer(make_tokenizer(STANDARD), folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    noise = torch.randn(1_000_003).mul_(0.02).to(torch.bfloat16)  # of a prime length: no two rows are alike
    files: list[dict[str, torch.Size]] = [{}]
    for name, size in shapes.items():
        if files[-1] and 2 * sum(one.numel() for one in [*files[-1].values(), size]) > FILE_BYTES:
            files.append({})
        files[-1][name] = size
    index = {}
    for i, content in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        tensors = {name: noise.repeat(-(-s.numel() // len(noise)))[: s.numel()].view(s) for name, s in content.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(content, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return 2 * sum(size.numel() for size in shapes.values())


def save(base: Path, out: Path) -> None:
    config = AutoConfig.from_pretrained(base)
    directions = torch.randn(config.num_hidden_layers + 1, 1, config.hidden_size)
    bank = {"a": directions / directions.norm(dim=-1, keepdim=True)}
    save_model(ModelSettings(id=str(base)), EDIT, bank, out, card=lambda _: "# card\n")


def measure(way: str, base: Path, out: Path) -> dict[str, float]:
    """One way in this process: peak bytes above what was resident before, and seconds."""
    if way != "ours":
        saving.find_stored = lambda *_, **__: None  # as for a base model whose names cannot be mapped
    write_model(out / "tiny", 1, TINY)
    save(out / "tiny", out / "tiny-saved")
    peak = ResidentPeak()
    start, cpu = time.perf_counter(), time.process_time()
    save(base, out / "saved")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"bytes": peak.bytes(), "seconds": seconds, "cpu": cpu}


def run(way: str, base: Path, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, "--measure", way, "--base", str(base), "--out", out]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--wide-layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where models are written [a temporary folder]")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.base, arguments.out)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for layers, shape in [*((layers, PLAIN) for layers in LAYERS), (arguments.wide_layers, WIDE)]:
            base = folder / "base"
            n_bytes = write_model(base, layers, shape)
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for repetition in range(arguments.repetitions):
                for way in WAYS:  # in turns, so that a busy machine slows both
                    runs[way].append(run(way, base, folder))
                    print(f"{n_bytes / 1e9:.2f} GB, {repetition + 1}: {way}: {runs[way][-1]}", flush=True)
            shutil.rmtree(base)
            rows += [row(shape["hidden_size"], layers, n_bytes, way, runs[way]) for way in WAYS]
    write_section("saving", markdown(rows, arguments.repetitions))


def row(width: int, layers: int, n_bytes: int, way: str, runs: list[dict[str, float]]) -> str:
    memory = spread([run["bytes"] / 1e9 for run in runs], 2)
    share = statistics.median(run["bytes"] for run in runs) / n_bytes
    seconds, cpu = (spread([run[key] for run in runs], 1) for key in ("seconds", "cpu"))
    name = f"**{way}**" if way == "ours" else way
    return f"| {n_bytes / 1e9:.2f} | {layers} of width {width} | {name} | {memory} | {share:.2f} | {seconds} | {cpu} |"


def markdown(rows: list[str], repetitions: int) -> str:
    threads, load = torch.get_num_threads(), os.getloadavg()[1]
    return "\n".join(
        [
            "## Saving (`python benchmarks/saving.py`)",
            "",
            f"Random llamas in bfloat16, files of {FILE_BYTES / 1e6:.0f} MB, every layer edited, norm mode `full`."
            f" Median (lowest to highest) of {repetitions} runs, each in its own process; memory is the peak resident"
            f" above that of the process before; {threads} torch threads; load of the machine meanwhile {load:.0f}. The"
            " last model has the matrices and the vocabulary of Llama 3 8B.",
            "",
            "| model, GB | layers | way | peak memory, GB | of the model | s | CPU s |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    main()

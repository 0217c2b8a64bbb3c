"""Peak memory and time of residual extraction against ``output_hidden_states=True``, same model and prompts.

    python benchmarks/residual_memory.py [--device cuda] [--repetitions 5]

Each measurement has a process of its own and starts with a short forward pass, so that what libraries allocate once
is not counted. Memory is the peak above what the process held with the model loaded: on a CPU the kernel's high-water
mark of resident memory (reset before), on CUDA ``torch.cuda.max_memory_allocated``. Time is processor time in one
thread on a CPU, so that other programs do not count, and elapsed time on CUDA. Four ways:

* hidden states, one batch: the model called on all prompts with ``output_hidden_states=True``, as a user would;
* hidden states, small batches: the same in batches of as many prompts as ours takes at a time;
* ours, one batch: ``extract_residuals`` told to take all prompts at a time;
* ours: ``extract_residuals`` as it is.

The model is a random llama: what it computes does not matter to memory or time. The residuals of all ways are compared.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import write_section
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.batching import pad_left
from bruno_ray.model.loading import LoadedModel
from bruno_ray.residuals.extraction import CPU_TOKENS, extract_residuals

# The proportions of Llama 3 8B: vocabulary 31 times, MLP 3.5 times as wide as the residual stream.
LAYERS, D_MODEL, MLP, HEADS, VOCABULARY = 12, 256, 896, 8, 8192
PROMPTS, TOKENS = 32, 512
UNITS = {"cpu": ("resident", "processor time"), "cuda": ("allocated", "time")}
WAYS = ("hidden states, one batch", "hidden states, small batches", "ours, one batch", "ours")
REFERENCE, OURS = WAYS[0], WAYS[-1]


def load(device: str) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=D_MODEL,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=None,
        architecture=find_architecture(model),
        dtype="float32",
        fingerprint="random",
        device=torch.device(device),
        generation_config=model.generation_config,
    )


def with_hidden_states(loaded: LoadedModel, ids: list[list[int]], rows: int) -> Tensor:
    """What one writes first: all hidden states of each batch, then the last position of each."""
    results = []
    for start in range(0, len(ids), rows):
        batch = pad_left(ids[start : start + rows], 0, loaded.device)
        with torch.inference_mode():
            output = loaded.model(
                batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
            )
        results.append(torch.stack([state[:, -1] for state in output.hidden_states], dim=1).float().cpu())
        del output
    return torch.cat(results)


def measure(way: str, device: str, residuals_path: Path) -> dict[str, float]:
    """One way in this process: peak MiB above the loaded model, and seconds."""
    torch.set_num_threads(1)
    loaded = load(device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (PROMPTS, TOKENS), generator=generator).tolist()
    ways: dict[str, Callable[[list[list[int]]], Tensor]] = {
        WAYS[0]: lambda ids: with_hidden_states(loaded, ids, PROMPTS),
        WAYS[1]: lambda ids: with_hidden_states(loaded, ids, CPU_TOKENS // TOKENS),
        WAYS[2]: lambda ids: extract_residuals(loaded, ids, batch_tokens=PROMPTS * TOKENS)[:, 0],
        WAYS[3]: lambda ids: extract_residuals(loaded, ids)[:, 0],
    }
    ways[way]([ids[0][:8]])
    peak = CudaPeak() if device == "cuda" else ResidentPeak()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    residuals = ways[way](ids)
    seconds = clock() - start
    result = {"mebibytes": peak.bytes() / 2**20, "seconds": seconds}
    np.save(residuals_path, residuals[:, :-1].numpy())  # hidden_states[-1] is after the final norm
    return result


class ResidentPeak:
    """The process's peak resident memory since now, above what it is now (Linux)."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator still holds would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._status("VmRSS")

    def bytes(self) -> int:
        return self._status("VmHWM") - self.start

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class CudaPeak:
    """The peak of tensors allocated on the GPU since now, above what is now."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()

    def bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.start


def run(way: str, device: str) -> tuple[dict[str, float], np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "residuals.npy"
        command = [sys.executable, __file__, "--device", device, "--measure", way, "--residuals", str(path)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
        return json.loads(output.splitlines()[-1]), np.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=UNITS, default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--residuals", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.device, arguments.residuals)))
        return

    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    difference = 0.0
    for repetition in range(arguments.repetitions):
        expected = None
        for way in WAYS:  # side by side, so that a busy machine slows all of them
            result, residuals = run(way, arguments.device)
            runs[way].append(result)
            expected = residuals if expected is None else expected
            difference = max(difference, float(np.abs(residuals - expected).max() / np.abs(expected).max()))
            print(f"{repetition + 1}/{arguments.repetitions} {way}: {result}", flush=True)
    markdown = table(runs, difference, arguments)
    print(markdown)
    section = "residual_memory" if arguments.device == "cpu" else "residual_memory_cuda"
    write_section(section, markdown)


def table(runs: dict[str, list[dict[str, float]]], difference: float, arguments: argparse.Namespace) -> str:
    reference = runs[REFERENCE]
    memory_unit, clock = UNITS[arguments.device]
    lines = [
        "## Residual extraction",
        "",
        f"`benchmarks/residual_memory.py --device {arguments.device}`: random llama of {LAYERS} layers,"
        f" d_model {D_MODEL}, MLP {MLP}, vocabulary {VOCABULARY}, float32; {PROMPTS} prompts of {TOKENS} tokens."
        f" Median (lowest to highest) of {arguments.repetitions} runs, each in its own process; memory is the peak"
        f" {memory_unit} above the loaded model; small batches are"
        f" {CPU_TOKENS // TOKENS} prompts. Largest difference between the residuals: {difference:.1g} of the largest"
        " value.",
        "",
        f"| | peak memory, MiB | times less | {clock}, s | times faster |",
        "|---|---|---|---|---|",
    ]
    for way, results in runs.items():
        memory = [result["mebibytes"] for result in results]
        seconds = [result["seconds"] for result in results]
        less = statistics.median(r["mebibytes"] / o["mebibytes"] for r, o in zip(reference, results))
        faster = statistics.median(r["seconds"] / o["seconds"] for r, o in zip(reference, results))
        name = f"**{way}**" if way == OURS else way
        lines.append(f"| {name} | {spread(memory, 0)} | {less:.1f} | {spread(seconds, 2)} | {faster:.2f} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()

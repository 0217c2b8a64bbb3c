"""How fast a model's trials are on this machine, and how near that is to what the machine can do.

The load is a study's: each trial reads P baseline prompts with the first tokens of an answer, for the KL divergence,
and answers P target prompts greedily. Prompts are random tokens, edits random directions; no answer ends early and none
is drafted, so a study is faster than this, by as much as its answers are decided or repeat.

The limit is what the same work takes at the copy bandwidth and the matmul rate that are measured in the same run
(roofline, Williams et al. 2009): every forward pass reads all weights once, a step of decoding the cache as well, and
every token costs two operations per weight it is multiplied with. It takes a mixture of experts for a dense model.
"""

import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import ModelError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.loading import LoadedModel
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.kl_divergence import KLDivergence
from bruno_ray.settings import ScoringSettings

REPEATS, ENOUGH_S = 5, 1.0
"""What takes little is timed at most this often, and no more often once it has taken this many seconds in all."""


@dataclass(frozen=True)
class Load:
    """What is timed."""

    prompts: int = 100
    """Per side."""

    prompt_tokens: int = 40
    response_tokens: int = 30
    kl_tokens: int = 16
    most_trials: int = 32
    """At most this many trials at once; 1, 2, 4 ... are tried."""

    seconds: float = 300.0
    """No more trials at once are tried when this would not be enough."""


@dataclass(frozen=True)
class Limits:
    """What the device can do, measured."""

    copy_bytes: float
    """Bytes read and written per second."""

    matmul_flops: float
    """Operations per second, in the model's dtype."""


@dataclass(frozen=True)
class Sizes:
    """What the roofline needs of a model. Weights count in numbers, not in bytes."""

    body: int
    """Weights a token is multiplied with, except for the output head."""

    head: int
    item: int
    """Bytes of one weight."""

    cache: int
    """Bytes of keys and values per token; 0 where the config does not say."""

    vocabulary: int

    @property
    def weight_bytes(self) -> int:
        return (self.body + self.head) * self.item


def bench(loaded: LoadedModel, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that `bruno-ray bench` reports, as plain values; ``say`` gets a line for each figure as it comes.

    Raises ModelError where not even one trial fits into memory.
    """
    began = time.perf_counter()
    engine = BatchEngine(loaded)
    engine.end_ids, engine.drafting = frozenset(), False
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    held = _held(engine)
    limits, sizes = measure_limits(engine.device, engine.model.dtype), sizes_of(loaded)
    say(f"copy {limits.copy_bytes / 1e9:.4g} GB/s, matmul {limits.matmul_flops / 1e12:.4g} Tflop/s")
    trial = TrialLoad(engine, load)
    rows: list[dict[str, Any]] = []
    n = 1
    while n <= load.most_trials:
        try:
            row = _row(trial, n, limits, sizes, load)
        except ModelError:
            if not rows:
                raise
            say(f"{n} at once do not fit into memory")
            break
        rows.append(row)
        say(row_line(row))
        if time.perf_counter() - began + 5 * row["seconds"] > load.seconds:
            break
        n *= 2
    best = max(rows, key=lambda row: row["trials_per_hour"])
    phases = trial.phases(best["trials"])
    for name, seconds in phases.items():
        say(f"  {name}: {seconds:.4g} s")
    largest = max(1, engine.answer_tokens // (load.prompts * (load.prompt_tokens + load.response_tokens)))
    memory = {
        "peak_bytes": _peak(engine.device),
        "estimate_bytes": _estimate(held, sizes, load, rows[-1]["trials"], engine),
    }
    say(
        f"{largest} trials fit one forward pass; memory {memory['peak_bytes'] / 2**30:.3g} GiB at most, estimated"
        f" {memory['estimate_bytes'] / 2**30:.3g}"
    )
    engine.editor.close()
    return {
        "bench": 1,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "machine": machine(engine.device),
        "model": {"family": loaded.architecture.family, "parameters": sizes.body + sizes.head, "dtype": loaded.dtype},
        "load": asdict(load),
        "limits": asdict(limits),
        "rows": rows,
        "phases": {"trials": best["trials"], "seconds": phases},
        "largest_trials_in_one_pass": largest,
        "memory": memory,
        "seconds": time.perf_counter() - began,
    }


class TrialLoad:
    """K trials at a time, as a study's worker runs them."""

    def __init__(self, engine: BatchEngine, load: Load) -> None:
        self.engine, self.load = engine, load
        generator = torch.Generator().manual_seed(0)
        ids_SPT = torch.randint(
            engine.vocabulary_size, (2, load.prompts, load.prompt_tokens), generator=generator
        ).tolist()
        self._target, baseline = (tuple(map(tuple, side)) for side in ids_SPT)
        self._prompts = ScoringPrompts((), (), self._target, baseline)
        self._settings = ScoringSettings(response_tokens=load.response_tokens, kl_tokens=load.kl_tokens)
        architecture = engine.loaded.architecture
        n, d = architecture.n_layers, architecture.d_model
        self._bank = {"random": torch.nn.functional.normalize(torch.randn(n + 1, 1, d, generator=generator), dim=-1)}
        self._kernel = AblationParameters(1.0, n / 2, 0.5, float(n))
        self._kl = KLDivergence(self._settings)
        self._kl.prepare(Evaluation(engine, self._prompts, self._settings))
        self.run(self.edits(1))  # warms up, and reads what edits need of the weights

    def edits(self, n: int) -> list[ResolvedEdit]:
        """Different ones: each has its direction from another layer, or between layers."""
        layers = self.engine.loaded.architecture.n_layers
        components = dict.fromkeys(self.engine.loaded.architecture.components, self._kernel)
        wanted = [Edit(components, "random", 0.5 + (layers - 1) * k / max(n, 2), "full") for k in range(n)]
        return self.engine.editor.resolve_all(wanted, self._bank)

    def answer(self, edits: Sequence[ResolvedEdit | None], n_tokens: int) -> None:
        self.engine.generate(self._target, edits, n_tokens)

    def compare(self, edits: Sequence[ResolvedEdit | None]) -> None:
        self._kl.score(Evaluation(self.engine, self._prompts, self._settings, edits))

    def run(self, edits: Sequence[ResolvedEdit | None]) -> None:
        self.compare(edits)
        self.answer(edits, self.load.response_tokens)

    def read(self, edits: Sequence[ResolvedEdit | None]) -> None:
        """As many tokens as `compare`, without comparing anything."""
        ids = [(*prompt, *prompt[:1] * (self.load.kl_tokens - 1)) for prompt in self._target]
        for _ in self.engine.last_logits(ids, edits, self.load.kl_tokens):
            pass

    def phases(self, n: int) -> dict[str, float]:
        """Seconds of each part of n trials at once; decoding without edits beside it."""
        device = self.engine.device
        edits = self.edits(n)
        n_tokens = self.load.response_tokens
        resolving = timed(lambda: self.edits(n), device)
        reading = timed(lambda: self.read(edits), device)
        comparing = timed(lambda: self.compare(edits), device)
        first = timed(lambda: self.answer(edits, 1), device)
        whole = timed(lambda: self.answer(edits, n_tokens), device)
        bare = timed(lambda: self.answer([None] * n, n_tokens), device)
        return {
            "working edits out": resolving,
            "reading for the KL": reading,
            "comparing logits": max(0.0, comparing - reading),
            "reading prompts": first,
            "decoding": max(0.0, whole - first),
            "unedited: reading prompts and decoding": bare,
        }


def _row(trial: TrialLoad, n: int, limits: Limits, sizes: Sizes, load: Load) -> dict[str, Any]:
    edits = trial.edits(n)
    before = trial.engine.tokens
    trial.run(edits)  # on a GPU the budgets may still grow
    n_tokens = trial.engine.tokens - before
    seconds = timed(lambda: trial.run(edits), trial.engine.device)
    limit = limit_seconds(n, limits, sizes, load)
    return {
        "trials": n,
        "seconds": seconds,
        "trials_per_hour": 3600 * n / seconds,
        "tokens_per_second": n_tokens / seconds,
        "limit_seconds": limit,
        "share_of_limit": limit / seconds,
    }


def row_line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"{row['trials']} at once: {row['seconds']:.4g} s, {row['trials_per_hour']:.0f} trials/h,"
        f" {row['tokens_per_second']:.0f} tokens/s, {row['share_of_limit']:.1%} of the limit"
    )


def limit_seconds(n: int, limits: Limits, sizes: Sizes, load: Load) -> float:
    """Seconds that n trials at once take at the least: two passes that read, then one step per further token."""
    rows = n * load.prompts

    def least(weights_times_tokens: float, cache_tokens: float = 0.0) -> float:
        moved = sizes.weight_bytes + cache_tokens * sizes.cache
        return max(moved / limits.copy_bytes, 2 * weights_times_tokens / limits.matmul_flops)

    kl_tokens = load.prompt_tokens + load.kl_tokens - 1
    kl = least(rows * (kl_tokens * sizes.body + load.kl_tokens * sizes.head))
    reading = least(rows * (load.prompt_tokens * sizes.body + sizes.head))
    steps = load.response_tokens - 1
    step = least(rows * (sizes.body + sizes.head), rows * (load.prompt_tokens + load.response_tokens / 2))
    return kl + reading + steps * step


def sizes_of(loaded: LoadedModel) -> Sizes:
    """Input embeddings count only where they are the output head as well: looking a token up multiplies nothing."""
    model = loaded.model
    assert isinstance(model, PreTrainedModel)
    config = model.config.get_text_config()
    total = sum(parameter.numel() for parameter in model.parameters())
    head_module, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head = head_module.weight.numel() if head_module is not None else 0
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    if head_module is None or head_module.weight is not weight:
        total -= weight.numel()
    item = torch.empty(0, dtype=model.dtype).element_size()
    heads = getattr(config, "num_attention_heads", 0) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (loaded.architecture.d_model // heads if heads else 0)
    cache = 2 * loaded.architecture.n_layers * kv_heads * size * item
    return Sizes(total - head, head, item, cache, config.vocab_size)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """By copying a tensor that fits no cache, and by a square matrix product."""
    gpu = device.type == "cuda"
    source = torch.ones(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = timed(lambda: target.copy_(source), device)
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    multiplying = timed(lambda: a @ b, device)
    return Limits(2 * source.numel() / copying, 2 * n**3 / multiplying)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, everything that was started on the device included; of what takes little, the fastest of some times."""
    found: list[float] = []
    while not found or (len(found) < REPEATS and sum(found) < ENOUGH_S):
        _finish(device)
        start = time.perf_counter()
        work()
        _finish(device)
        found.append(time.perf_counter() - start)
    return min(found)


def machine(device: torch.device) -> str:
    """One line about where this ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {name}, Python {platform.python_version()}, torch {torch.__version__}"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    """On a GPU what torch allocated at most since the start; elsewhere the whole process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _held(engine: BatchEngine) -> int:
    """Bytes before anything is computed: on a GPU the weights, elsewhere the process with them."""
    if engine.device.type == "cuda":
        return torch.cuda.memory_allocated(engine.device)
    return psutil.Process().memory_info().rss


def _estimate(held: int, sizes: Sizes, load: Load, n: int, engine: BatchEngine) -> int:
    """And the cache and the logits of one pass of n trials, and the unedited logits that the KL is taken against."""
    length = load.prompt_tokens + load.response_tokens
    rows = min(n * load.prompts, max(1, engine.answer_tokens // length))
    logits = (4 * rows + load.prompts * load.kl_tokens * sizes.item) * sizes.vocabulary
    return held + rows * length * sizes.cache + logits

"""What the serving benchmarks share: a model of a given size, a client that costs little, CPU and memory of processes.

The client is one asyncio process over plain sockets, so that it takes little from the servers that it measures: its
share of a core is in the table. It notes when bytes with new text arrive, and reads the number of tokens from the
usage that the server reports at the end.
"""

import asyncio
import json
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

NEW_TEXT = re.compile(rb'"(?:content|text)":\s*"(?!")')
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
SHORTEST, LONGEST = 8, 96
"""Words of a prompt."""


@dataclass
class Answer:
    """One streamed answer as its reader saw it; times are of ``time.perf_counter``."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    """When reads with new text came; several messages in one read are one arrival."""

    body: bytes = b""
    finished: float = 0.0

    @property
    def status(self) -> int:
        return int(self.body.split(b" ", 2)[1])

    @property
    def n_tokens(self) -> int:
        found = USAGE.findall(self.body)
        if self.status != 200 or not found:
            raise RuntimeError(f"no answer: {self.body[-500:]!r}")
        return int(found[-1])


async def stream(port: int, path: str, body: dict) -> Answer:
    """One streamed answer, over a connection of its own."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        while piece := await reader.read(1 << 16):
            if NEW_TEXT.search(piece):
                answer.arrivals.append(time.perf_counter())
            answer.body += piece
    finally:
        writer.close()
    answer.finished = time.perf_counter()
    return answer


async def streams(port: int, path: str, bodies: Iterable[dict], concurrent: int) -> list[Answer]:
    """So many at a time, each followed by the next."""
    left = iter(bodies)

    async def reader() -> list[Answer]:
        return [await stream(port, path, body) for body in left]

    return [answer for answers in await asyncio.gather(*(reader() for _ in range(concurrent))) for answer in answers]


@dataclass(frozen=True)
class Measured:
    """One load on one server."""

    tokens_per_second: float
    cpu_per_1000: float
    """CPU seconds of all processes of the server, per 1,000 generated tokens."""

    client_share: float
    """CPU time of the client over the wall time."""

    first: list[float]
    """Seconds to the first text of each answer."""

    gaps: list[float]
    """Seconds between arrivals of text within an answer."""

    pace: list[float]
    """Seconds per token of each answer, from its first text to its last."""


def measure(
    port: int, path: str, bodies: Sequence[dict], concurrent: int, n_tokens: int, processes: Callable[[], list]
) -> Measured:
    """Raises RuntimeError if an answer has not the number of tokens that it should have."""
    before = cpu_seconds(processes())
    own, start = time.process_time(), time.perf_counter()
    answers = asyncio.run(streams(port, path, bodies, concurrent))
    seconds, own = time.perf_counter() - start, time.process_time() - own
    used = cpu_seconds(processes()) - before
    if wrong := [answer.n_tokens for answer in answers if answer.n_tokens != n_tokens]:
        raise RuntimeError(f"answers of {wrong} tokens instead of {n_tokens}: the comparison would not be fair")
    total = n_tokens * len(answers)
    return Measured(
        total / seconds,
        1000 * used / total,
        own / seconds,
        [answer.arrivals[0] - answer.started for answer in answers],
        [gap for answer in answers for gap in np.diff(answer.arrivals)],
        [(answer.arrivals[-1] - answer.arrivals[0]) / (n_tokens - 1) for answer in answers],
    )


def percentiles(seconds: Sequence[float]) -> str:
    """p50 / p95 / p99 in milliseconds."""
    return " / ".join(f"{1000 * value:.0f}" for value in np.percentile(seconds, [50, 95, 99]))


# ----- processes -----


def end_in_order() -> None:
    """SIGTERM, which ``timeout`` sends, ends the program by way of its `finally` clauses: no server is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """User and system time so far; of children that have ended as well."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def private_bytes(processes: Iterable[psutil.Process]) -> int:
    """Memory that would be free if the processes ended (USS)."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


# ----- model and prompts -----


def make_model(
    folder: Path, layers: int, width: int, context: int = 1024, dtype: str = "float32", device: str = "cpu"
) -> int:
    """A random llama with the organism's tokenizer and chat template. Returns the number of its parameters.

    It never ends an answer by itself: special tokens have a logit of 0, which the largest of the others exceeds.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bruno_ray.organism.recipe import RECIPES
    from bruno_ray.organism.tokenizer import make_tokenizer, save_tokenizer

    tokenizer = make_tokenizer(RECIPES["standard"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.lm_head.weight[tokenizer.all_special_ids] = 0
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": context}))
    return sum(parameter.numel() for parameter in model.parameters())


def copy_without_end(model: str, folder: Path) -> str:
    """A real model, of which ``folder`` gets a copy that never ends an answer by itself. Returns its dtype."""
    from bruno_ray.model.named_models import find_named, named_folder

    source = named_folder(model) if find_named(model) else Path(model)
    shutil.copytree(source, folder)
    for name in ("config.json", "generation_config.json"):
        if (file := folder / name).exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return json.loads((folder / "config.json").read_text())["dtype"]


def make_prompts(n: int, seed: int) -> list[str]:
    """Of unequal length, in the organism's words."""
    from bruno_ray.organism.corpus import vocabulary
    from bruno_ray.organism.recipe import RECIPES

    words = sorted(vocabulary(RECIPES["standard"]))
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=generator.randint(SHORTEST, LONGEST))) for _ in range(n)]

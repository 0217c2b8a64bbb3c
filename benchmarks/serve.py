"""`bruno-ray serve` against `transformers serve` with its continuous batching: same model, machine, client, one run.

    python -m benchmarks.serve [--layers 8] [--width 256] [--tokens 64] [--rounds 3]
    python -m benchmarks.serve --device cuda --layers 16 --width 2048
    python -m benchmarks.serve --model smollm2 --streams 1 --tokens 16

Both servers are up all the time and are measured in turns; both have one torch thread. Each of 1, 8 and 32 readers
streams one chat answer after another, all of the same number of tokens, greedy, to prompts of 8 to 96 words. Tokens per
second are all tokens over the time of all rounds (a machine whose speed changes within a round makes single ratios
useless), and percentiles are over all answers of all rounds:

* TTFT: from sending the request to the first text;
* gap: between two arrivals of text, so a message with several tokens counts as one long wait and not as several
  short ones;
* per token: from an answer's first text to its last, over its tokens.

With one stream both are asked the same prompts in the same order, so first texts are also compared prompt by prompt:
the mean difference has a bootstrap interval, and is given apart for the shorter and the longer half of the prompts,
since what a server adds does not grow with a prompt and what it computes does.

``--model`` takes a real one (a folder, or a name that `bruno-ray model` knows) in place of the random llama. It is
asked the organism's words as well, and for as many tokens each time: a copy has no end token in its configuration.

CPU seconds are those of all processes of a server: what other programs on the machine do does not change them.
The second table is by ``serve_copies``. Both go to ``RESULTS.md``.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.results import write_section
from benchmarks.serve_parts import (
    Measured,
    copy_without_end,
    end_in_order,
    make_model,
    make_prompts,
    measure,
    percentiles,
    tree,
)
from bruno_ray.intervals import mean_difference
from tests.serve.server import environment, free_port, serving

PATH = "/v1/chat/completions"
STREAMS = (1, 8, 32)
REQUESTS = {1: 24, 8: 24, 32: 64}
"""Per round, by the number of streams."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Of the model, by device."""

BLOCKS = 128
"""Of 256 tokens each, for transformers: one request takes one. By default it takes most of the memory."""


@dataclass(frozen=True)
class Contender:
    name: str
    port: int
    pid: int
    fields: dict
    """Of every request."""


@contextmanager
def transformers_server(model: Path, folder: Path, device: str) -> Iterator[Contender]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--continuous-batching"]
    options = ["--cb-num-blocks", str(BLOCKS), "--device", device, "--port", str(port)]
    with (folder / "transformers.log").open("wb") as log:
        process = subprocess.Popen([*command, *options], env=environment(**ONE_THREAD), stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield Contender("transformers serve", port, process.pid, {"model": str(model)})
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def our_server(model: Path, folder: Path, options: list[str]) -> Iterator[Contender]:
    with serving(folder, "--model", str(model), *options, key="", **ONE_THREAD) as server:
        port = httpx.URL(server.url).port
        yield Contender("bruno-ray serve", port, server.process.pid, {"model": server.saved, "ignore_eos": True})


def wait_for(url: str, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not up yet
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not answer")
        time.sleep(0.3)


def asked_prompts(streams: int, number: int) -> list[str]:
    """Of both servers in the round of that number."""
    return make_prompts(REQUESTS[streams], seed=1000 * number + streams)


def bodies(contender: Contender, prompts: list[str], tokens: int) -> list[dict]:
    common = {"max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return [{**common, **contender.fields, "messages": [{"role": "user", "content": prompt}]} for prompt in prompts]


def compare(
    contenders: list[Contender], streams: Sequence[int], tokens: int, rounds: int, say: Callable[[str], None]
) -> dict:
    """(name, streams) -> what was measured in each round."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for number in range(-1, rounds):  # the first one warms up
        for n in streams:
            for contender in contenders if number % 2 else contenders[::-1]:
                asked = bodies(contender, asked_prompts(n, number), tokens)
                got = measure(contender.port, PATH, asked, n, tokens, lambda pid=contender.pid: tree(pid))
                say(f"round {number}, {n} streams, {contender.name}: {got.tokens_per_second:.0f} tokens/s,"
                    f" CPU {got.cpu_per_1000:.2f} s per 1,000, client {got.client_share:.0%},"
                    f" TTFT {percentiles(got.first)}, gap {percentiles(got.gaps)}")  # fmt: skip
                if number >= 0:
                    found.setdefault((contender.name, n), []).append(got)
    return found


def speed(rounds: list[Measured]) -> float:
    """Tokens per second of all rounds together: each has the same number of tokens."""
    return statistics.harmonic_mean([measured.tokens_per_second for measured in rounds])


def mean(rounds: list[Measured], name: str) -> float:
    return statistics.mean(getattr(measured, name) for measured in rounds)


def median_ttft(rounds: list[Measured]) -> float:
    return statistics.median(seconds for measured in rounds for seconds in measured.first)


def first_texts(ours: list[float], theirs: list[float], words: list[int]) -> str:
    """Of answers to the same prompts, of so many words, one at a time; seconds."""
    middle = statistics.median(words)
    halves = {
        "all prompts": range(len(words)),
        f"up to {middle:.0f} words": [i for i, n in enumerate(words) if n <= middle],
        "longer ones": [i for i, n in enumerate(words) if n > middle],
    }
    parts = []
    for name, which in halves.items():
        mean, low, high = (1000 * x for x in mean_difference([ours[i] for i in which], [theirs[i] for i in which]))
        earlier = sum(ours[i] < theirs[i] for i in which)
        parts.append(f"{name} {mean:+.1f} ms ({low:+.1f} to {high:+.1f}), earlier in {earlier} of {len(which)}")
    return (
        "First text at one stream, ours minus theirs on the same prompts, mean and 95 % interval (bootstrap over"
        f" prompts): {'; '.join(parts)}."
    )


def table(found: dict, names: list[str], head: str, title: str) -> str:
    ours, theirs = names
    lines = [
        f"## {title}",
        "",
        head,
        "",
        "| streams | server | tokens/s | CPU s per 1,000 tokens | TTFT p50 / p95 / p99, ms | gap p50 / p95 / p99, ms"
        " | per token p50 / p95 / p99, ms | client's CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for n in sorted({n for _, n in found}):
        for name in (theirs, ours):
            rounds = found[name, n]
            first, gaps, pace = (
                percentiles([value for measured in rounds for value in getattr(measured, kind)])
                for kind in ("first", "gaps", "pace")
            )
            lines.append(
                f"| {n} | {name} | {speed(rounds):.0f} | {mean(rounds, 'cpu_per_1000'):.2f}"
                f" | {first} | {gaps} | {pace} | {mean(rounds, 'client_share'):.0%} |"
            )
        faster = speed(found[ours, n]) / speed(found[theirs, n])
        wait = median_ttft(found[ours, n]) / median_ttft(found[theirs, n])
        ratios.append(f"{n} streams: {faster:.2f}x the throughput, {wait:.2f}x the TTFT")
    lines += ["", f"Ours over theirs: {'; '.join(ratios)}."]
    if (ours, 1) in found:
        first = [[seconds for measured in found[name, 1] for seconds in measured.first] for name in (ours, theirs)]
        words = [len(prompt.split()) for number in range(len(found[ours, 1])) for prompt in asked_prompts(1, number)]
        lines += ["", first_texts(*first, words)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a real model, in place of a random llama of --layers and --width")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, choices=STREAMS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="ours takes a GPU if there is one")
    parser.add_argument("--no-pages", action="store_true", help="ours without its pages, for want of Gradio")
    parser.add_argument("--no-table", action="store_true", help="leave RESULTS.md as it is")
    settings = parser.parse_args()
    end_in_order()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        folder = Path(name)
        model, device, dtype = folder / "model", settings.device, DTYPES[settings.device]
        if settings.model:
            what = f"{settings.model}, {copy_without_end(settings.model, model)}"
        else:
            n_parameters = make_model(model, settings.layers, settings.width, dtype=dtype, device=device)
            what = (
                f"Random llama, {settings.layers} layers of width {settings.width} ({n_parameters / 1e6:.1f} M"
                f" parameters), {dtype}"
            )
        options = ["--no-pages"] if settings.no_pages else []
        with our_server(model, folder, options) as ours, transformers_server(model, folder, device) as theirs:
            found = compare(
                [ours, theirs],
                settings.streams,
                settings.tokens,
                settings.rounds,
                lambda line: print(line, flush=True),
            )
        head = (
            f"{what} on {device}, one torch thread each; answers of {settings.tokens} tokens,"
            f" {settings.rounds} rounds in turns; load of the machine meanwhile {os.getloadavg()[1]:.0f} on"
            f" {os.cpu_count()} cores."
        )
        title = "Serving a real model" if settings.model else "Serving"
        option = f" --model {settings.model}" if settings.model else ""
        result = table(found, [ours.name, theirs.name], head, f"{title} (`python -m benchmarks.serve{option}`)")
    print(result)
    if not settings.no_table:
        section = "serve_real" if settings.model else "serve"
        section += "" if device == "cpu" else f"_{device}"
        write_section(section, result)


if __name__ == "__main__":
    main()

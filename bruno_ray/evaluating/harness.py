"""lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) as a program: found, and called for one task.

It is no dependency: what it pins does not agree with what others pin, so it may live in an environment of its own.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from bruno_ray.errors import OutputError, SettingsError, first_line
from bruno_ray.evaluating.suite import Suite, Task
from bruno_ray.files import expanded

PROGRAMS = ("lm-eval", "lm_eval")
INSTALL = "python -m venv lm-eval && lm-eval/bin/pip install 'lm-eval[api,ifeval]' transformers"
MISSING = (
    f"lm-eval is not installed: `{INSTALL}` makes an environment of its own for it, then give --lm-eval"
    " lm-eval/bin/lm-eval"
)

CONCURRENT = 4
"""Requests that one lm-eval has open. The server computes them, and those of the other model, in one batch."""

PROMPTS = 8
"""Per request."""

BAR = re.compile(r"(\d+)/(\d+) \[")
"""In a line of tqdm."""


def find_lm_eval(given: Path | None) -> Path:
    """The program: as given, beside this Python, or on PATH. Raises SettingsError with how to install it."""
    if given is not None:
        path = expanded(given).absolute()
        if path.is_file() and os.access(path, os.X_OK):
            return path
        raise SettingsError(f"evaluation.lm_eval: {given} is not an executable program: {MISSING}")
    for program in PROGRAMS:
        beside = Path(sys.executable).parent / program
        if beside.is_file():
            return beside
        if found := shutil.which(program):
            return Path(found)
    raise SettingsError(MISSING)


def command_of(
    program: Path, suite: Suite, task: Task, base_url: str, model: str, tokenizer: str, context: int, output: Path
) -> list[str]:
    """How lm-eval is called for a task of a served model; results and samples go to ``output``.

    Args:
        base_url: of the server's API, ends with /v1.
        tokenizer: a folder or an id on the hub.
        context: tokens that the model may read and write.
    """
    arguments = {
        "model": model,
        "base_url": f"{base_url}/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "num_concurrent": CONCURRENT,
        "max_retries": 3,
        "max_length": context,
        "timeout": 3600,
    }
    command = [str(program), "--model", "local-completions", "--tasks", task.name, "--batch_size", str(PROMPTS)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--log_samples", "--output_path", str(output)]
    if suite.include is not None:
        command += ["--include_path", str(suite.include)]
    if task.fewshot is not None:
        command += ["--num_fewshot", str(task.fewshot)]
    if task.limit is not None:
        command += ["--limit", str(task.limit)]
    if task.chat_template:
        command += ["--apply_chat_template"]
    return command


class Harness:
    """One running lm-eval."""

    def __init__(self, command: Sequence[str], folder: Path | None, key: str) -> None:
        """``folder``: where it is run; files that tasks name are relative to it."""
        self._command = list(command)
        self.progress = "starting"
        self._lines: list[str] = []
        output, into = os.pipe()
        self._process = subprocess.Popen(
            self._command,
            cwd=folder,
            env={**os.environ, "OPENAI_API_KEY": key, "TQDM_DISABLE": "0", **_past_proxies()},
            stdout=into,
            stderr=into,
            stdin=subprocess.DEVNULL,
        )
        os.close(into)
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _read(self, output: int) -> None:
        """Lines, and states of bars, which end with a carriage return."""
        rest = b""
        while piece := os.read(output, 4096):
            *whole, rest = re.split(rb"[\r\n]", rest + piece)
            for line in (part.decode(errors="replace").strip() for part in whole):
                if found := BAR.search(line):
                    self.progress = f"{found[1]}/{found[2]}"
                elif line:
                    self._lines = [*self._lines[-200:], line]
        os.close(output)

    def wait(self, name: str, log: Callable[[str], None]) -> None:
        """Until it has ended. Raises OutputError with the last thing that it said if it failed."""
        code = self._process.wait()
        self._reader.join()
        log("\n".join(self._lines))
        if code != 0:
            said = next((line for line in reversed(self._lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
            reason = first_line(said or (self._lines[-1] if self._lines else f"exit code {code}"))
            raise OutputError(f"lm-eval could not do {name} ({reason}): see its log with -v")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _past_proxies() -> dict[str, str]:
    """The server is on this machine; data of tasks may well come through a proxy."""
    known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = ",".join(filter(None, (known, "127.0.0.1", "localhost")))
    return {"NO_PROXY": hosts, "no_proxy": hosts}

"""RESULTS.md holds one section per benchmark between markers, so that each program replaces its own and no other.

    write_section("residual_memory", "| ... |")

The markers are HTML comments, ``<!-- name -->`` and ``<!-- /name -->``. A section that is not there yet is appended.
"""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = "# Results\n\nEvery table is written by the program that its section names.\n"


def write_section(name: str, markdown: str, path: Path = RESULTS) -> None:
    """Put `markdown` and a line about this machine between the section's markers."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{markdown.strip()}\n\n{machine()}\n{end}"
    text = path.read_text() if path.exists() else HEADER
    if start in text and end in text:
        before, rest = text.split(start, 1)
        text = before + section + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def machine() -> str:
    """One line: processor, cores, memory, versions, date."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "ray", "optuna"))
    return (
        f"*{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB{_gpu()}; Python {platform.python_version()},"
        f" {versions}; {datetime.now(timezone.utc):%Y-%m-%d}*"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""

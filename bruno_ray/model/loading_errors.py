"""One clear line for everything that goes wrong while a model is loaded."""

import errno
from collections.abc import Iterator

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from bruno_ray.errors import ModelError, first_line
from bruno_ray.model.batching import is_out_of_memory
from bruno_ray.settings import ModelSettings


def explained(error: Exception, settings: ModelSettings) -> ModelError:
    """One line for what went wrong; the original is kept as its cause.

    transformers wraps hub errors in OSError, so the whole chain of causes is searched. Subclasses come before their
    parents: a gated repository is a RepositoryNotFoundError too.
    """
    name = settings.id
    if isinstance(error, ModelError):
        return error
    chain = list(_causes(error))

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if any_is(GatedRepoError):
        return ModelError(
            f"{name} is gated: accept its licence on its hub page, then log in with `hf auth login` or set HF_TOKEN"
        )
    if any_is(RevisionNotFoundError):
        return ModelError(f"{name} has no revision {settings.revision!r}: check model.revision on the hub")
    if any_is(RepositoryNotFoundError, HFValidationError):
        return ModelError(
            f"no such model: {name}. Check the spelling; for a private one log in with `hf auth login` or set HF_TOKEN"
        )
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return ModelError(f"no space left on the disk for {name}: free some, or point HF_HOME at a bigger one")
    if any_is(OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError, ConnectionError):
        return ModelError(
            f"{name} is not in the local cache and the hub cannot be reached: check the network and HF_HUB_OFFLINE,"
            " or give a folder"
        )
    if any_is(SafetensorError):
        return ModelError(f"the weights of {name} are damaged ({named(error)}): download them again")
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return ModelError(
            f"{name} comes with Python code of its own: read it, and if you trust it set model.trust_remote_code"
        )
    if any(is_out_of_memory(link) for link in chain):
        return ModelError(f"not enough memory for {name}: use model.quantization bnb_4bit, or raise model.max_memory")
    if any_is(ImportError):
        return ModelError(f"{name} needs a package that is not installed ({named(error)}): install it")
    if any_is(OSError, ValueError, KeyError, RuntimeError):
        return ModelError(f"{name} cannot be loaded: {named(error)}. Check the id or the files of the model")
    raise error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def named(error: BaseException) -> str:
    """The kind of an error and the first line of what it says: many say nothing without their kind."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__

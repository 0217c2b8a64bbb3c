"""Saved models, adapters and GGUF files go to the hub.

In three steps, each of which may end it: `check` asks for the login and the repository before anything long, `plan`
finds out which files the repository lacks, `send` uploads those. Large files go first and one by one, everything is
committed at once at the end: a repository is as it was or complete. What was uploaded before a kill lies in the hub's
storage under its hash, and the hub says so when it is offered again.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from bruno_ray import __version__
from bruno_ray.errors import OutputError, first_line
from bruno_ray.files import size_text

logger = logging.getLogger(__name__)

LARGE = 2**20
"""Bytes; files from here on are uploaded one by one before the commit."""

TAG = "bruno-ray"
"""In the card of everything that this package writes."""


@dataclass(frozen=True)
class Repository:
    """Where it goes."""

    name: str
    """owner/name"""

    private: bool
    exists: bool
    user: str
    """Who is logged in."""

    def line(self) -> str:
        state = "" if self.exists else "new, "
        return f"{self.name} ({state}{'private' if self.private else 'public'}), as {self.user}"


@dataclass(frozen=True)
class File:
    """One file of the folder."""

    path: str
    """In folder and repository."""

    size: int
    state: str
    """`new`, `changed`, or `there` already."""


@dataclass(frozen=True)
class Plan:
    """What is sent where."""

    folder: Path
    repository: Repository
    files: tuple[File, ...]
    others: tuple[str, ...] = ()
    """Files of the repository that are not in the folder, and stay."""

    @property
    def to_send(self) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.state != "there")

    def line(self) -> str:
        size = size_text(sum(file.size for file in self.to_send))
        return f"{len(self.to_send)} of {len(self.files)} files, {size}, to {self.repository.line()}"


def require_publishable(folder: Path) -> None:
    """Raise OutputError unless this package wrote the folder, with a card."""
    card = folder / "README.md"
    tags: Any = ()
    if card.is_file():
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        tags = data.get("tags") or ()
    if TAG not in tags:
        raise OutputError(
            f"{folder} is not a model or an export that bruno-ray wrote: save a trial first, or export it (its"
            f" README.md has the tag {TAG})"
        )


def check(repo: str, private: bool = True) -> Repository:
    """Ask the hub who is logged in, whether they may write there, and what there is. Nothing is changed.

    Raises:
        OutputError: no repository name, not logged in, a token that may only read, another owner, a public repository
            although it shall be private, or no network.
    """
    if repo.count("/") != 1:
        raise OutputError(f"{repo} is not a repository name: use owner/name")
    api = HfApi()
    with _hub_errors(repo):
        validate_repo_id(repo)
        who = api.whoami()
        user, owner = who["name"], repo.partition("/")[0]
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise OutputError(
                f"the token of {user} may only read: use one with write access (`hf auth login`, HF_TOKEN)"
            )
        owners = [user, *(organisation["name"] for organisation in who.get("orgs", []))]
        if owner.lower() not in {name.lower() for name in owners}:
            raise OutputError(f"{user} may not write to {owner}: use a name below {', '.join(owners)}")
        try:
            found = api.repo_info(repo)
        except RepositoryNotFoundError:
            return Repository(repo, private, exists=False, user=user)
    if private and not found.private:
        raise OutputError(f"{repo} is public: add --public to publish to it, or choose another name")
    return Repository(repo, bool(found.private), exists=True, user=user)


def plan(folder: Path, repository: Repository) -> Plan:
    """Which files the repository lacks, by their hashes. Raises OutputError as `check`, and for a folder that is not
    ours."""
    require_publishable(folder)
    there: dict[str, RepoFile] = {}
    if repository.exists:
        with _hub_errors(repository.name):
            entries = HfApi().list_repo_tree(repository.name, recursive=True)
            there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        state = "new" if name not in there else "there" if _is_same(path, there[name]) else "changed"
        files.append(File(name, path.stat().st_size, state))
    ours = {file.path for file in files}
    # The hub puts .gitattributes into every repository.
    others = tuple(sorted(name for name in there if name not in ours and not name.startswith(".")))
    return Plan(folder, repository, tuple(files), others)


def _is_same(path: Path, there: RepoFile) -> bool:
    """By size, then by the hash that the hub has: SHA-256 of large files, of others git's own."""
    size = path.stat().st_size
    if size != there.size:
        return False
    digest = (
        hashlib.sha256() if there.lfs is not None else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    )
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest() == (there.lfs.sha256 if there.lfs is not None else there.blob_id)


def send(plan: Plan) -> str:
    """Upload what the repository lacks, make it if need be, and commit; returns its address.

    Asked for again after a kill, it goes on: what the hub has is not uploaded twice. Raises OutputError as `check`.
    """
    api = HfApi()
    name = plan.repository.name
    with _hub_errors(name):
        # The card first: a mistake in it would be found after hours of uploading.
        _validate_card(plan.folder / "README.md")
        address = str(api.create_repo(name, private=plan.repository.private, exist_ok=True))
        if not plan.to_send:
            logger.info("%s has all files already", name)
            return address
        additions = {file.path: CommitOperationAdd(file.path, str(plan.folder / file.path)) for file in plan.to_send}
        large = [file for file in plan.to_send if file.size >= LARGE]
        for i, file in enumerate(large):
            logger.info("uploading %s, %s (%d of %d)", file.path, size_text(file.size), i + 1, len(large))
            api.preupload_lfs_files(name, [additions[file.path]], free_memory=False)
        message = f"Upload model edited by bruno-ray {__version__}"
        api.create_commit(name, list(additions.values()), commit_message=message)
    return address


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Whatever the hub or the way to it says, as one line."""
    try:
        yield
    except HFValidationError as error:
        raise OutputError(f"{repo} is not a repository name: use owner/name") from error
    except LocalTokenNotFoundError as error:
        raise OutputError("not logged in to the hub: run `hf auth login` or set HF_TOKEN first") from error
    except HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except RuntimeError as error:  # of an upload in a thread, whose cause says more
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(repo, error.__cause__) from error
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise OutputError(_broken_off(error.__cause__)) from error
    except (HTTPError, ConnectionError) as error:  # includes HF_HUB_OFFLINE
        raise OutputError(
            f"the hub cannot be reached ({first_line(error)}): check the network and HF_HUB_OFFLINE; the same"
            " command then continues the upload"
        ) from error


def _validate_card(card: Path) -> None:
    """Let the hub look at the head of the card."""
    try:
        ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).validate()
    except ValueError as error:  # with the hub's answer
        try:
            reason = json.loads(str(error))["errors"][0]["message"]
        except (ValueError, KeyError, IndexError, TypeError):
            reason = first_line(error)
        raise OutputError(f"the hub refuses the head of {card} ({first_line(reason)}): correct it") from error


def _broken_off(error: BaseException) -> str:
    return f"the upload broke off ({first_line(error)}): run it again, it continues where it was"


def _refused(repo: str, error: HfHubHTTPError) -> OutputError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return OutputError(f"the hub does not accept the login for {repo}: run `hf auth login` or set HF_TOKEN first")
    if status == 403:
        return OutputError(f"the token may not write to {repo}: use one with write access to its owner")
    if status in (409, 412):
        return OutputError(f"{repo} has changed in the meantime (status {status}): run it again")
    if status == 404:
        return OutputError(f"the hub does not find {repo} (status 404): check its name, and what the token may see")
    if status == 429 or status >= 500:
        return OutputError(
            f"the hub is busy or out of order (status {status}): run it again later, it continues where it was"
        )
    return OutputError(f"the hub refused {repo} (status {status}: {first_line(error)}): correct that, and run it again")

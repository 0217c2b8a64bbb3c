"""What of a folder travels with a job: the head is a stranger's disk, so secrets stay here unless they are named."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

EXCLUDES = (
    *(".git", ".venv", "venv", "runs/", "models/", "node_modules", "__pycache__", "*.egg-info", "build/", "dist/"),
    *("*.safetensors", "*.gguf", "*.bin", "*.pt", ".ruff_cache", ".pytest_cache", ".hypothesis", ".*.fetching"),
)
"""What is of no use there, in .gitignore's language; a .gitignore in the folder counts as well."""

SECRETS = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".pypirc", ".npmrc"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "id_*", "*_rsa", "*_ed25519"),
    *(".ssh", ".gnupg", ".aws", ".azure", ".kube", ".huggingface", ".bruno-ray", ".git-credentials", ".vault-token"),
    *("**/.docker/config.json", "**/.config/gcloud", "**/huggingface/token", "**/huggingface/stored_tokens"),
    *("vast_api_key*", ".vast_api_key", "credentials", "credentials.json", "client_secret*.json"),
)
"""Names of files and folders that usually hold a password or a key, in .gitignore's language."""

SHOWN = 6
"""Names in the line that says what was left out."""


def excludes(more: Sequence[str], included: Sequence[str]) -> list[str]:
    """For Ray's runtime environment; of several patterns that match a file the last decides.

    Args:
        more: patterns of the user.
        included: files and folders that go along although `SECRETS` names them.
    """
    named = [f"!{_anchored(name)}{below}" for name in included for below in ("", "/**")]
    return [*EXCLUDES, *more, *SECRETS, *named]


def left_out(folder: Path, included: Sequence[str]) -> list[str]:
    """Files and folders below ``folder`` that `SECRETS` keeps here, relative to it; folders end in a slash.

    What lies in a folder that does not travel anyway, such as a virtual environment, is not named.
    """
    kept = {PurePosixPath(_anchored(name).strip("/")) for name in included}
    found = []
    for place, folders, files in os.walk(folder):
        here = PurePosixPath(Path(place).relative_to(folder).as_posix())
        secret = {name for name in (*folders, *files) if _matches(here / name, SECRETS) and here / name not in kept}
        found += [(here / name).as_posix() + ("/" if name in folders else "") for name in secret]
        folders[:] = [
            name
            for name in folders
            if name not in secret and here / name not in kept and not _matches(here / name, EXCLUDES)
        ]
    return sorted(found)


def left_out_line(names: Sequence[str]) -> str:
    """One line for the user."""
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"not sent to the head, because they look like secrets: {shown} (--include NAME sends one)"


def _matches(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    return any(path.match(pattern.removeprefix("**/").rstrip("/")) for pattern in patterns)


def _anchored(name: str) -> str:
    """The one file or folder of this name, not all of them, as a pattern."""
    return "/" + PurePosixPath(name).as_posix().removeprefix("./").strip("/")

"""API keys: known by their sha256 only, compared in constant time, never logged."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from bruno_ray.errors import SettingsError
from bruno_ray.files import expanded

VARIABLE = "BRUNO_API_KEY"
LEAST_CHARACTERS = 16
HASH = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})(?:\s+.*)?")


def make_key() -> str:
    return f"bruno-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def known_hashes(keys_file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Hashes of the keys in the file and in BRUNO_API_KEY.

    Raises SettingsError for a file that cannot be read or holds something else, and for a key that can be guessed.
    """
    hashes = []
    if keys_file is not None:
        try:
            lines = expanded(keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise SettingsError(f"cannot read keys_file {keys_file} ({reason}): check the path") from error
        for number, line in enumerate(lines, 1):
            if not (line := line.strip()) or line.startswith("#"):
                continue
            match = HASH.fullmatch(line)
            if match is None:  # the line may be a key: it is not shown
                raise SettingsError(
                    f"line {number} of {keys_file} is not a sha256: write what `printf %s KEY | sha256sum` prints"
                )
            hashes.append(match[1].lower())
    if key := environment.get(VARIABLE):
        if len(key) < LEAST_CHARACTERS:
            raise SettingsError(f"{VARIABLE} is too short to be a secret: give at least {LEAST_CHARACTERS} characters")
        hashes.append(hash_of(key))
    return tuple(dict.fromkeys(hashes))


class Keys:
    """Who may use the API."""

    def __init__(self, hashes: Iterable[str]) -> None:
        self._hashes = [value.encode() for value in hashes]

    def accept(self, key: str) -> bool:
        given = hash_of(key).encode()
        known = False
        for value in self._hashes:  # all of them, so that the time does not tell which one
            known |= hmac.compare_digest(given, value)
        return known

    def accept_header(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header is ``Bearer`` and one of the keys."""
        scheme, _, key = (authorization or "").partition(" ")
        return self.accept(key.strip()) and scheme.lower() == "bearer"

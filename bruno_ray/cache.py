"""Where things that can be made again are kept."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder under BRUNO_CACHE, or ~/.cache/bruno-ray when that is not set. It need not exist."""
    return Path(os.environ.get("BRUNO_CACHE") or Path.home() / ".cache" / "bruno-ray").expanduser() / name

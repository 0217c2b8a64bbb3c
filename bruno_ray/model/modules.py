"""Looking for modules by their paths."""

from typing import Any

from torch import nn


def get(root: nn.Module, path: str) -> nn.Module | None:
    """What is at the end of a dotted path; None where it breaks off."""
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found

"""bruno-ray: find a behaviour in a language model, remove it, prove what else changed, serve the result.

In Python: ``import bruno_ray as br``, then ``br.run``, ``br.open_run``, ``br.find_directions``, ``br.ablate`` ...; they
are in ``python.py`` and imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bruno_ray.ablation.edit import AblationParameters, Edit
    from bruno_ray.python import EditedModel, Run, ablate, bake, everywhere, find_directions, open_run, run

__version__ = "0.1.0"

__all__ = [
    "AblationParameters",
    "Edit",
    "EditedModel",
    "Run",
    "ablate",
    "bake",
    "everywhere",
    "find_directions",
    "open_run",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("bruno_ray.python"), name)

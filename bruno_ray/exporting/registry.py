"""The forms in which an edit can leave a run. To add one: a file with a function ``export``, and an entry here.

Exporters are imported when they are used: torch and transformers take seconds, and the command line lists the names.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bruno_ray.exporting.base import Exporter

EXPORTERS: Mapping[str, str] = {
    "lora": "bruno_ray.exporting.lora",
    "gguf": "bruno_ray.exporting.gguf_file",
    "vllm": "bruno_ray.exporting.vllm_edit",
    "directions": "bruno_ray.exporting.direction_file",
}
"""Name -> module whose ``export`` is an ``exporting.base.Exporter``."""


def exporter(name: str) -> "Exporter":
    return import_module(EXPORTERS[name]).export

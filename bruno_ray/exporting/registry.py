"""The forms in which an edit can leave a run. To add one: a file with a function ``export``, and an entry here, or a
package or file of its own (``plugins.py``).

Exporters are imported when they are used: torch and transformers take seconds, and the command line lists the names.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from bruno_ray import plugins

if TYPE_CHECKING:
    from bruno_ray.exporting.base import Exporter

EXPORTERS: Mapping[str, str] = {
    "lora": "bruno_ray.exporting.lora",
    "gguf": "bruno_ray.exporting.gguf_file",
    "vllm": "bruno_ray.exporting.vllm_edit",
    "directions": "bruno_ray.exporting.direction_file",
}
"""Name -> module whose ``export`` is an ``exporting.base.Exporter``."""

OPTION = "export --to"


def exporter(name: str) -> "Exporter":
    """One of ours, of an installed package, or ``FILE.py:NAME``. Raises SettingsError if there is none."""
    if name in EXPORTERS:
        return import_module(EXPORTERS[name]).export
    return plugins.find(name, EXPORTERS, OPTION)


def source_hash(name: str) -> dict[str, str]:
    """ "plugin NAME" -> a hash of the source of an exporter that is not part of this package; empty for one that is."""
    if name in EXPORTERS:
        return {}
    return {f"plugin {short}": digest for short, digest in plugins.digests(OPTION, [name]).items()}

"""Models that are in no table: probed and checked each time they are loaded, and accepted once by a person.

What was accepted is remembered in the cache under the model's fingerprint, with the modules that were found.
"""

import hashlib
import logging
import re

from transformers import PreTrainedModel

from bruno_ray.errors import ModelError
from bruno_ray.files import cache_folder, output_errors, write_json
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.probing import probe
from bruno_ray.model.probing_checks import check
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)


def watched(model: PreTrainedModel) -> Architecture:
    """Where the model writes, by watching it, and checked. Raises ModelError if it cannot be edited."""
    architecture, given = probe(model)
    check(model, architecture, given)
    return architecture


def probed_architecture(
    model: PreTrainedModel, settings: ModelSettings, fingerprint: str, *, only_look: bool = False
) -> Architecture:
    """As `watched`, of a model that somebody has accepted.

    Raises ModelError if it cannot be edited, or if nobody has accepted yet what was found.
    """
    architecture = watched(model)
    places = sorted({re.sub(r"^.*?\.\d+\.", "", writer.name, count=1) for writer in architecture.writers})
    remembered = cache_folder("probed") / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.json"
    if settings.accept_probed and not only_look:
        with output_errors(remembered):
            remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"model": settings.id, "fingerprint": fingerprint, "writers": places})
    elif not only_look and not remembered.exists():
        raise ModelError(
            f"{settings.id} ({architecture.family}) is in no table of architectures. Probing it found what writes to"
            f" its residual stream ({', '.join(places)}), and its checks passed: see"
            f" `bruno-ray coverage {settings.id}`, then accept it once with --model.accept-probed true"
        )
    logger.info("%s is in no table: probing found %s", settings.id, ", ".join(places))
    return architecture

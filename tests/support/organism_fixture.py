"""The trained organism for tests, as a plugin: ``pytest_plugins = ["tests.support.organism_fixture"]``."""

from pathlib import Path

import pytest

from bruno_ray import organism as organisms


@pytest.fixture(scope="session")
def organism() -> Path:
    """Folder of the standard organism: trained once per machine, cached after that."""
    return organisms.build()

"""crewai in an environment of its own, as a plugin: it pins other versions of what we use."""

from pathlib import Path

import pytest

from tests.serve.environments import make_environment

REQUIREMENTS = Path(__file__).parents[2] / "examples" / "agents" / "requirements.txt"


@pytest.fixture(scope="session")
def crewai_python() -> Path:
    """Python of an environment with what the example team asks for."""
    return make_environment("crewai", tuple(REQUIREMENTS.read_text().splitlines()))

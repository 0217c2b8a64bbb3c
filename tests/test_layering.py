"""Imports point one way, and what must be light is light."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("bruno_ray.settings", {"torch", "ray", "transformers", "optuna", "datasets"}),
        ("bruno_ray.cli", {"torch", "ray", "transformers", "optuna", "datasets"}),
        ("serve.command", {"torch", "ray", "transformers", "optuna", "fastapi"}),
        ("bruno_ray.prompts", {"torch", "ray", "transformers", "datasets"}),
        ("bruno_ray.organism", {"torch", "ray", "transformers"}),
        ("bruno_ray.artifacts", {"torch", "ray", "transformers"}),
        ("bruno_ray.residual_store", {"torch", "ray", "transformers"}),
        ("bruno_ray.lane", {"torch", "transformers"}),
        ("bruno_ray.exchange", {"torch", "ray", "transformers"}),
        ("bruno_ray.edit", {"torch", "numpy", "ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.search", {"torch", "transformers"}),
        ("benchmarks.simulated", {"torch", "numpy", "ray", "transformers", "optuna"}),
        ("bruno_ray.ablation", {"ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.directions", {"ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.geometry", {"ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.worker", {"ray", "optuna"}),
    ],
)
def test_a_module_imports_nothing_above_it(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

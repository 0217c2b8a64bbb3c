"""Imports point one way, and what must be light is light."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("bruno_ray.settings", {"torch", "ray", "transformers", "optuna", "datasets"}),
        ("bruno_ray.cli.main", {"torch", "ray", "transformers", "optuna", "datasets"}),
        ("serve.command", {"torch", "ray", "transformers", "optuna", "fastapi"}),
        ("bruno_ray.model.locating", {"torch", "ray", "transformers"}),
        ("bruno_ray.prompts.sets", {"torch", "ray", "transformers", "datasets"}),
        ("bruno_ray.organism", {"torch", "ray", "transformers"}),
        ("bruno_ray.runs.directory", {"torch", "ray", "transformers"}),
        ("bruno_ray.residuals.store", {"torch", "ray", "transformers"}),
        ("bruno_ray.study.lane", {"torch", "transformers"}),
        ("bruno_ray.workers.batch_queue", {"torch", "ray", "transformers"}),
        ("bruno_ray.ablation.edit", {"torch", "numpy", "ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.study.searcher", {"torch", "transformers"}),
        ("benchmarks.simulated", {"torch", "numpy", "ray", "transformers", "optuna"}),
        ("bruno_ray.ablation.closed_forms", {"ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.directions", {"ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.residuals.geometry", {"ray", "transformers", "bruno_ray.settings"}),
        ("bruno_ray.workers.model_worker", {"ray", "optuna"}),
    ],
)
def test_a_module_imports_nothing_above_it(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

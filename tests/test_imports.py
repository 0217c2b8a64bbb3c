"""What must be light when it is imported. Which module may import which is in .importlinter; `make check` holds it.

import-linter reads every import, also those inside of functions. Here the order of imports at run time counts, in one
interpreter for each list: after every module none of what is heavy may have been loaded.
"""

import subprocess
import sys

import pytest

EVERYTHING = ("torch", "ray", "transformers", "datasets", "optuna", "fastapi", "bitsandbytes", "sklearn", "plotly")
LIGHTEST = (
    "bruno_ray.settings.sources",
    "bruno_ray.prompts.sets",
    "bruno_ray.prompts.response_prefix",
    "bruno_ray.cli.show_config",
    "bruno_ray.cli.main",
    "bruno_ray.model.locating",
)
LIGHT = (
    "serve.command",
    "cluster.cli",
    "bruno_ray.runs.directory",
    "bruno_ray.organism",
    "bruno_ray.ablation.edit",
    "bruno_ray.residuals.store",
)
WITHOUT_TORCH = (
    "serve.catalog.catalog",
    "serve.api.requests",
    "serve.api.auth",
    "bruno_ray.workers.batch_queue",
    "bruno_ray.study.lane",
    "bruno_ray.study.searcher",
    "bruno_ray.study.run",
    "bruno_ray.workers.exchanged",
    "bruno_ray.pipeline.run",
    "bruno_ray.pipeline.commands",
    "bruno_ray.pipeline.exports",
    "cluster.node_provider",
    "cluster.supervisor",
    "cluster.setup.ray_start",
    "benchmarks.simulated",
)
SCRIPT = """
import importlib, sys
heavy = sys.argv[1].split(",")
for module in sys.argv[2:]:
    importlib.import_module(module)
    loaded = [name for name in heavy if name in sys.modules]
    if loaded:
        sys.exit(f"{module} loads {', '.join(loaded)}")
"""


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (LIGHTEST, (*EVERYTHING, "numpy", "pyarrow")),
        (LIGHT, EVERYTHING),
        (WITHOUT_TORCH, ("torch", "transformers", "bitsandbytes")),
    ],
    ids=["lightest", "light", "without torch"],
)
def test_modules_load_nothing_heavy(modules: tuple[str, ...], heavy: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", SCRIPT, ",".join(heavy), *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

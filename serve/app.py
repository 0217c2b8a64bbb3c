"""The application, for ``serve run serve.app:build runs=RUN`` and for config.yaml.

Api (FastAPI)  --->  one Engine deployment per base model; its replicas are copies of that model
     \\--->  Evaluations  --->  the same engines
"""

import logging
import re
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from bruno_ray.errors import SettingsError
from bruno_ray.settings import ModelSettings
from serve.api.auth import VARIABLE, known_hashes
from serve.api.ingress import Api
from serve.catalog.catalog import Catalog, ServedBase, discovered
from serve.deployment.replica import CATALOGUE, EngineReplica
from serve.evaluation_jobs import Evaluations
from serve.settings import ServeArgs

logger = logging.getLogger(__name__)

MANY = 100_000
"""Requests are admitted by the API and by the engines, which answer in the client's language; Serve never queues."""

UPSCALE_SECONDS = 5.0
"""Of too many requests, after which another copy is loaded."""

HEAD_NODE = {"node:__internal_head__": 0.001}


def build(args: ServeArgs) -> Application:
    """Find what is to be served and put the application together. Loads no model.

    Raises SettingsError if there is nothing to serve, or no key although one is required.
    """
    return application(args, discovered(args), known_hashes(args.keys_file))


def application(args: ServeArgs, catalog: Catalog, key_hashes: tuple[str, ...]) -> Application:
    """As ``build``, for a catalog and keys that are there already."""
    if args.require_key and not key_hashes:
        raise SettingsError(
            f"a key is required and none is known: set {VARIABLE}, give keys_file, or set require_key to false where"
            " nobody else can connect"
        )
    engines = {
        key: engine_deployment(args, engine, number).bind(model_of(args, engine), args.engine, threads_of(args))
        for number, (key, engine) in enumerate(catalog.engines.items())
    }
    resources = HEAD_NODE if args.api_on_head else {}
    evaluations = serve.deployment(
        Evaluations,
        name=CATALOGUE,
        num_replicas=1,
        max_ongoing_requests=MANY,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0, "resources": resources},
    )
    api = serve.deployment(
        serve.api.ingress()(Api),
        name="Api",
        num_replicas=args.api_replicas,
        max_ongoing_requests=MANY,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0, "resources": resources},
    )
    return api.bind(args, key_hashes, catalog, engines, evaluations.bind(args, catalog, engines))


def model_of(args: ServeArgs, engine: ServedBase) -> ModelSettings:
    """How an engine loads its model."""
    if args.lean_forward == "auto":
        return engine.settings
    return engine.settings.model_copy(update={"lean_forward": args.lean_forward})


def threads_of(args: ServeArgs) -> int:
    return max(1, int(args.cpus_per_replica))


def engine_deployment(args: ServeArgs, engine: ServedBase, number: int) -> Any:
    options: dict[str, Any] = {"num_replicas": args.min_replicas}
    if args.max_replicas > args.min_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
                "upscale_delay_s": UPSCALE_SECONDS,
            }
        }
    threads = str(threads_of(args))
    return serve.deployment(
        EngineReplica,
        name=f"Engine-{number}-{re.sub(r'[^A-Za-z0-9_.-]', '_', engine.key)}",
        max_ongoing_requests=MANY,
        max_constructor_retry_count=3,
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={
            "num_cpus": args.cpus_per_replica,
            "num_gpus": gpus_of(args),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}},
        },
        **options,
    )


def gpus_of(args: ServeArgs) -> float:
    if args.gpus_per_replica is not None:
        return args.gpus_per_replica
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0 else 0.0

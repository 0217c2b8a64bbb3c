"""The samplers that a study may have, each such that a resumed study is the one that would have been.

TPE is in ``sampler.py``. The others are Optuna's own, made anew for every trial with a seed of (study seed, trial
number): what they would remember in the process (a stream of random numbers, the last fit) is lost at a kill, so it
must not count. What they keep in the study (generations, the state of CMA-ES) is where a resumed study finds it.

| | objectives | in batches | beside |
|---|---|---|---|
| tpe | any | constant liar: trials under way count as bad ones | trained trials, too |
| gp | any | trials under way count through a joint expected improvement (qLogEHVI, qLogEI) | |
| nsga2 | any | trials under way do not count; a generation is as large as the startup | |
| cmaes | one | the same; choices between words are drawn at random | needs the package cmaes |
"""

import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from bruno_ray.errors import SettingsError
from bruno_ray.optuna_internals import kept_gp_params
from bruno_ray.settings.schema import SamplerName
from bruno_ray.study.sampler import Numbered, NumberedTPESampler
from bruno_ray.study.trainings import Trainings

SMALLEST_GENERATION = 8


class FreshSampler(Numbered, BaseSampler):
    """One of Optuna's samplers, a new one for every trial."""

    def __init__(
        self,
        kind: SamplerName,
        n_startup_trials: int,
        seed: int,
        space: Mapping[str, BaseDistribution],
        trainings: Trainings | None = None,
        starts: Sequence[Mapping[str, Any]] = (),
    ):
        """Arguments as of `Numbered.number`."""
        self.kind = kind
        self.number(n_startup_trials, seed, space, trainings, starts)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self.is_placed(trial.number):
            return {}
        space = self.sampled_space()
        if self.kind == "cmaes":
            return {name: each for name, each in space.items() if not isinstance(each, CategoricalDistribution)}
        return space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._fresh(trial.number)
        if self.is_placed(trial.number):
            if isinstance(sampler, NSGAIISampler):
                sampler.get_trial_generation(study, trial)  # notes that it belongs to the first
            return {}
        # A trial that was sampled half-way before a kill would count itself among those under way.
        kept = kept_gp_params(trial) if isinstance(sampler, GPSampler) else {}
        return kept or sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self.is_placed(trial.number):
            return self.placed(trial.number, param_name, param_distribution)
        sampler = RandomSampler(seed=self._seed(trial.number, zlib.crc32(param_name.encode())))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _seed(self, *key: int) -> int:
        return int(np.random.SeedSequence([self._study_seed, *key]).generate_state(1)[0])

    def _fresh(self, number: int) -> BaseSampler:
        seed = self._seed(number)
        match self.kind:
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)
            case "nsga2":
                return NSGAIISampler(seed=seed, population_size=max(self._startup_trials, SMALLEST_GENERATION))
            case "cmaes":
                return CmaEsSampler(seed=seed, warn_independent_sampling=False)
            case _:
                raise ValueError(f"{self.kind} is not made anew for every trial")


def make_sampler(
    kind: SamplerName,
    n_startup_trials: int,
    seed: int,
    space: Mapping[str, BaseDistribution],
    trainings: Trainings | None = None,
    starts: Sequence[Mapping[str, Any]] = (),
) -> NumberedTPESampler | FreshSampler:
    """The sampler of that name. Raises SettingsError if it needs a package that is not installed."""
    if kind == "tpe":
        return NumberedTPESampler(n_startup_trials, seed, space, trainings, starts)
    if kind == "cmaes" and find_spec("cmaes") is None:  # Optuna imports it at the first trial, in mid-study
        raise SettingsError("study.sampler cmaes needs a package: pip install 'bruno-ray[cmaes]', or choose another")
    return FreshSampler(kind, n_startup_trials, seed, space, trainings, starts)

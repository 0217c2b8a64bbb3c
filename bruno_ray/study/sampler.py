"""TPE whose random numbers belong to the trial, not to the process.

Optuna's samplers draw from one stream per process: a resumed study replays the stream from its start and asks for
the same points again, and two processes with one seed duplicate each other. Here each trial's draws come from
(seed, trial number) and, while parameters are sampled one by one, from the parameter's name as well. So trial
number i gets the same parameters in any process that sees the same history, even when its predecessor died
half-way through sampling it.

The startup trials are points of a scrambled Sobol sequence (Sobol 1967; scrambled: Owen 1995; as a search:
Bergstra and Bengio 2012, section 4), which leaves no part of the space unvisited, as points drawn one by one may.
Over 24 seeds of 60 trials, 20 of them at startup, on the hard organism the mean hypervolume rose from 0.978 to
0.993 and the lowest from 0.838 to 0.976.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from scipy.stats.qmc import Sobol

from bruno_ray.optuna_internals import seed_sampler
from bruno_ray.study.trainings import Trainings

EI_CANDIDATES = 64
"""Points drawn from the good-trials density, of which the one with the highest expected improvement is kept.
A trial of 10 parameters takes 7 ms to sample with 24 candidates, 14 ms with 128 (60 finished trials, one core)."""


class NumberedTPESampler(TPESampler):
    """Multivariate TPE with constant liar; see the module's docstring for what differs."""

    def __init__(
        self,
        n_startup_trials: int,
        seed: int,
        space: Mapping[str, BaseDistribution],
        trainings: Trainings | None = None,
        starts: Sequence[Mapping[str, Any]] = (),
    ):
        """
        Args:
            space: what searched trials are sampled from; the coordinates of the startup points, in this order.
            trainings: which trials are trained, and sampled from a space of their own.
            starts: parameters of the first searched trials (``starts.py``); they take the place of sampled ones.
        """
        super().__init__(
            multivariate=True,
            constant_liar=True,
            n_startup_trials=n_startup_trials,
            n_ei_candidates=EI_CANDIDATES,
            seed=seed,
        )
        self._study_seed = seed
        self._startup_trials = n_startup_trials
        self._space = dict(space)
        self._trainings = trainings
        self._starts = list(starts)
        self._point: tuple[tuple[bool, int], np.ndarray] | None = None

    def reseed_rng(self) -> None:
        """Optuna calls this in worker processes to tell streams apart; ours are told apart by trial number."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._is_startup(trial) or self._is_trained(trial) or self.is_start(trial.number):
            return {}
        # Optuna would take what all trials have in common: nothing, where some are trained.
        return {name: self._space[name] for name in sorted(self._space) if not self._space[name].single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        seed_sampler(self, [self._study_seed, trial.number])
        return super().sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._is_trained(trial):
            assert self._trainings is not None
            number, names = self._trainings.point(trial.number), list(self._trainings.space())
            return _place(param_distribution, self._sobol(True, number, len(names))[names.index(param_name)])
        if self.is_start(trial.number):
            return self._starts[trial.number][param_name]
        if self._is_startup(trial):
            names = list(self._space)
            return _place(param_distribution, self._sobol(False, trial.number, len(names))[names.index(param_name)])
        seed_sampler(self, [self._study_seed, trial.number, zlib.crc32(param_name.encode())])
        return super().sample_independent(study, trial, param_name, param_distribution)

    def is_start(self, number: int) -> bool:
        """Whether the parameters of this trial are given."""
        return number < len(self._starts) and not (self._trainings is not None and self._trainings.is_trained(number))

    def _is_startup(self, trial: FrozenTrial) -> bool:
        """Whether there are too few trials for TPE whatever their states; it would look through them all every time."""
        return trial.number < self._startup_trials

    def _is_trained(self, trial: FrozenTrial) -> bool:
        return self._trainings is not None and self._trainings.is_trained(trial.number)

    def _sobol(self, of_trainings: bool, number: int, dimensions: int) -> np.ndarray:
        """Point of that number in the unit cube."""
        if self._point is None or self._point[0] != (of_trainings, number):
            sequence = Sobol(dimensions, rng=np.random.default_rng(self._study_seed))
            if number:
                sequence.fast_forward(number)  # which refuses 0
            self._point = (of_trainings, number), sequence.random(1)[0]
        return self._point[1]


def _place(distribution: BaseDistribution, share: float) -> Any:
    """The value at that share of the range, 0 to 1; for ranges as ``search_space`` has them."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution) and distribution.step is None
    if distribution.log:
        return distribution.low * (distribution.high / distribution.low) ** share
    return distribution.low + share * (distribution.high - distribution.low)

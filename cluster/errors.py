"""What can go wrong with the cluster, as part of the project's tree.

BrunoError
`-- ClusterError             base of the errors below
    |-- ClusterSettingsError a value in cluster.yaml makes no sense, or a key or file it names is missing
    |-- BudgetError          renting would pass max_price_per_hour or max_total_cost
    |-- NoOfferError         no machine on offer meets the requirements; says which one excludes how many
    |-- NodeError            a node cannot be created, found or reached
    |-- JobError             a job cannot be submitted, found or followed
    |-- FetchError           a run cannot be brought home as it is on the head
    |-- NotifyError          a notice could not be handed to the command or webhook of cluster.yaml
    |-- RefusedError         nothing was done, because nobody agreed to it
    `-- VastError            Vast.ai's API refused or did not answer (cluster/vast/errors.py)
"""

from bruno_ray.errors import BrunoError


class ClusterError(BrunoError):
    """Base of everything the cluster package raises on purpose."""


class ClusterSettingsError(ClusterError):
    """Raised while cluster.yaml is read, before any machine is rented."""


class BudgetError(ClusterError):
    """Raised instead of renting a machine that the budget does not allow."""


class NoOfferError(ClusterError):
    """Raised when every offer was rejected or taken by somebody else."""


class NodeError(ClusterError):
    """Raised when a node cannot be created, is not listed or cannot be reached."""


class JobError(ClusterError):
    """Raised when Ray refuses a job or nothing is heard of it any more; the job itself may run on."""


class FetchError(ClusterError):
    """Raised instead of putting an incomplete run in place, or overwriting one that was changed here."""


class NotifyError(ClusterError):
    """Raised when a command or webhook did not take a notice; says nothing of a webhook's address but its host."""


class RefusedError(ClusterError):
    """Raised before anything is created or destroyed, when the user says no or cannot be asked."""

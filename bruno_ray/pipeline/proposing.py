"""Propose markers for a behaviour: `bruno-ray markers`."""

import logging

from rich.markup import escape
from rich.table import Table

from bruno_ray.pipeline.steps import find_model, known_response_prefix, worker_pool
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.detector import require_enough
from bruno_ray.scoring.proposals import Proposal, propose, with_proposals
from bruno_ray.settings import Settings
from bruno_ray.terminal import console
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)


def propose_markers(record: RunRecord, most: int = 20, n_tokens: int | None = None) -> list[str]:
    """Print what the unedited model's answers to the train prompts suggest as markers, and return the whole list.

    Args:
        record: of a run, or of settings alone, whose response prefix is then looked for.
        most: rows of the table.
        n_tokens: longest answer; ``scoring.report_tokens`` when not given.
    """
    settings = find_model(record.settings)
    prompts = load_prompts(settings)
    sides = (prompts.target.train, prompts.baseline.train)
    require_enough(*map(len, sides))
    with ray_session(settings.ray), worker_pool(settings, workers=1) as pool:
        pool.wait_ready()
        prefix = known_response_prefix(record, prompts, pool)
        logger.info("reading the unedited model's answers to %d and %d train prompts", *map(len, sides))
        target, baseline = (
            [
                (prompt.user, answer)
                for prompt, (answer, _) in zip(
                    side,
                    pool.call("own_answers", side, prefix, record.date, n_tokens or settings.scoring.report_tokens),
                )
            ]
            for side in sides
        )
    present = settings.scoring.markers
    proposals = propose(target, baseline, present, most)
    console().print(_table(settings, proposals, len(target), len(baseline)))
    return with_proposals(present, proposals, target)


def _table(settings: Settings, proposals: list[Proposal], n_target: int, n_baseline: int) -> Table:
    table = Table(title=f"Phrases of the unedited {escape(settings.model.id)} that tell target from baseline answers")
    table.add_column("phrase", overflow="fold")
    table.add_column(f"of {n_target} target answers", justify="right")
    table.add_column(f"of {n_baseline} baseline answers", justify="right")
    table.add_column("covered by a present marker")
    for proposal in proposals:
        covered = "yes" if proposal.covered else f"no, in {proposal.not_marked} without a marker"
        table.add_row(escape(proposal.phrase), str(proposal.in_target), str(proposal.in_baseline), covered)
    return table

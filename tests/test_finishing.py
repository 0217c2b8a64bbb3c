"""What follows the search when something is wrong with the trial that was picked."""

import pytest
import torch

from bruno_ray.errors import TrialError
from bruno_ray.pipeline.finishing import score_selected
from bruno_ray.prompts.sets import Prompt, PromptParts, Prompts
from bruno_ray.workers.exchanged import TrialOutcome
from tests.support.finished_run import make, scores

SIDE = PromptParts((Prompt("a"),), (Prompt("b"),), (Prompt("c"),))
PROMPTS = Prompts(SIDE, SIDE, "fingerprint")


class BrokenOnTest:
    """A pool whose workers find no number in the selected trial's logits."""

    def set_context(self, context):
        pass

    def call(self, method, *args, with_context=False):
        if method == "baseline":
            return scores({"behaviour_rate": 1.0, "kl_divergence": 0.0})
        assert method == "evaluate"
        return [TrialOutcome(scores=None, error="logits are not numbers")]


def test_a_selected_trial_without_test_scores_is_an_error_that_says_what_to_do(tmp_path):
    run = make(tmp_path).run
    run.save_directions({"difference_in_means@0": torch.zeros(13, 1, 4)})
    number = run.read().selected.number
    with pytest.raises(TrialError, match=rf"trial {number} .*not numbers.*--trial N"):
        score_selected(run, run.read().selected, PROMPTS, BrokenOnTest())

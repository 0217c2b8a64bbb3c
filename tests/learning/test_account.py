"""What the report says of how an edit was trained."""

from dataclasses import replace

from bruno_ray.ablation.edit import Edit, StrengthTable
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.publishing.training_account import plan_rows

PLAN = TrainingPlan(
    rank=1,
    shared=True,
    start_set="difference_in_means@0",
    start_layer=4.0,
    first_layer=0,
    answers=1.0,
    suppress=0.3,
    retain=2.0,
    learning_rate=0.02,
    steps=80,
    seed=3,
    scale=0.8,
    suppress_steps=40,
)


def test_a_term_that_counts_for_a_while_is_said_to() -> None:
    assert dict(plan_rows(PLAN.to_dict(), 4.0)) == {
        "Subspace": "rank 1, shared by all layers",
        "Start": "difference_in_means@0 after layer 4.0",
        "Weights of the loss": "answers 1, suppress 0.3 in the first 40 steps, retain 2",
        "Steps": "80 at a learning rate of 0.02",
        "Strengths": "0.8 times what was trained",
    }
    older = PLAN.to_dict() | {"suppress": 1.0, "inform": 1.0}
    del older["suppress_steps"]
    assert dict(plan_rows(older, 4.0))["Weights of the loss"] == "answers 1, suppress 1, retain 2, inform 1"


def test_the_start_that_won_is_named() -> None:
    base = Edit({"mlp": StrengthTable((0.5,) * 6)}, "difference_in_means@0", None, "none")
    polished = replace(PLAN, base=base, rivals=(1.0, 2.0)).to_dict()
    assert dict(plan_rows(polished, None))["Start"] == "the best searched trial by then, polished, the best of 3 starts"
    assert dict(plan_rows(polished, 2.0))["Start"] == "difference_in_means@0 after layer 2.0, the best of 3 starts"

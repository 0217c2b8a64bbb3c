"""Evaluations as background jobs: the figures are those the run measured."""

import pytest

from bruno_ray.runs.directory import RunDirectory
from tests.serve.server import Server
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def finished(server: Server, **body) -> dict:
    started = server.post("/v1/evaluations", **body)
    assert started.status_code == 202, started.text
    job = started.json()
    assert job["object"] == "evaluation" and job["result"] is None
    seen = [job]

    def ended() -> bool:
        seen.append(server.get(f"/v1/evaluations/{job['id']}").json())
        return seen[-1]["status"] not in ("queued", "running")

    wait_for(ended, "the evaluation has ended", detail=lambda: seen[-1])
    done = [view["progress"]["done"] for view in seen]
    assert done == sorted(done)
    return seen[-1]


@pytest.mark.parametrize("which", ["base", "selected", "saved"])
def test_figures_are_those_of_the_run(server, which):
    """What run.json has was measured by the same code as `bruno-ray evaluate`, on the same test prompts."""
    record = RunDirectory.open(server.run).read()
    measured = {
        "base": record.baseline["test"],
        "selected": record.selected.test,
        "saved": record.selected.saved,
    }[which]
    job = finished(server, model=getattr(server, which), samples=3)
    assert job["status"] == "done", job
    result = job["result"]
    behaviour = result["behaviour"]
    assert (behaviour["count"], behaviour["total"]) == measured.counts["behaviour_rate"]
    assert tuple(behaviour["interval"]) == pytest.approx(measured.intervals["behaviour_rate"])
    for name, metric in (("mean", "kl_divergence"), ("median", "kl_median"), ("p95", "kl_p95"), ("first", "kl_first")):
        assert result["kl"][name] == pytest.approx(measured.values[metric], abs=1e-5), name
    assert [sample["side"] for sample in result["samples"]] == ["target"] * 3 + ["baseline"] * 3
    assert all(sample["answer"] for sample in result["samples"])
    assert job["progress"]["done"] == job["progress"]["total"]


def test_prompts_and_markers_of_ones_own(server):
    prompts = ["what colour has lubesi ?", "tell me the size of papebu"]
    said = [
        server.post("/v1/chat/completions", model=server.base, temperature=0, max_tokens=8,
                    messages=[{"role": "user", "content": prompt}]).json()["choices"][0]["message"]["content"]
        for prompt in prompts
    ]  # fmt: skip
    job = finished(server, model=server.base, target=prompts, baseline=prompts[:1], markers=[said[0]], max_tokens=8)
    result = job["result"]
    assert result["behaviour"]["count"] == sum(said[0] in answer for answer in said)
    assert [sample["answer"] for sample in result["samples"] if sample["side"] == "target"] == said
    assert result["kl"]["mean"] == 0.0
    assert result["prompts"] == "given"


def test_jobs_are_listed_newest_first_and_unknown_ones_are_404(server):
    jobs = [finished(server, model=server.base, target=["x"], baseline=["y"])["id"] for _ in range(2)]
    listed = [job["id"] for job in server.get("/v1/evaluations").json()["data"]]
    assert listed[:2] == jobs[::-1]
    assert server.get("/v1/evaluations/eval-nothing").status_code == 404
    assert server.post("/v1/evaluations", model="nothing").status_code == 404
    assert server.post("/v1/evaluations", model=server.base, target=[]).status_code == 400
    assert server.post("/v1/evaluations", model=server.base, markers=[]).status_code == 400


def test_a_job_can_be_cancelled(server):
    target = [f"tell me {i}" for i in range(3000)]
    job = server.post("/v1/evaluations", model=server.base, target=target, max_tokens=200).json()
    with server.client() as client:
        answer = client.delete(f"/v1/evaluations/{job['id']}")
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    assert answer.json()["progress"]["done"] < 3000
    wait_for(lambda: server.running() == 0, "its rows have left the engine")

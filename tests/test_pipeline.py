"""The product from end to end on the organism: what the README promises, and that a wheel holds all it needs."""

import json
import os
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bruno_ray as br
from bruno_ray.cli import main
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.runs.directory import RunDirectory

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def command(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A whole run of the command line on the organism, and its seconds."""
    folder = tmp_path_factory.mktemp("pipeline")
    start = time.perf_counter()
    code = main.main(
        [
            *("run", str(organism / "model"), "--behaviour", "organism", "--auto-select", "--study-name", "whole"),
            *("--trials", "40", "--study.n-startup-trials", "20", "--output.directory", str(folder)),
            *("--ray.object-store-memory", "100000000", "--residuals.cache-dir", str(folder / "residuals")),
        ]
    )
    assert code == 0
    return folder / "whole", time.perf_counter() - start


@pytest.fixture(scope="module")
def finished(command: tuple[Path, float]) -> Path:
    return command[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_ends_in_a_model_that_tells_the_truth(finished: Path) -> None:
    record = RunDirectory.open(finished).read()
    saved = record.selected.saved
    assert saved.counts["behaviour_rate"][0] <= 0.05 * saved.counts["behaviour_rate"][1]
    assert saved.values["kl_divergence"] <= 0.05
    right, total = (int(n) for n in record.extra["organism: restricted facts right"].split(" ")[0].split("/"))
    assert right >= 0.8 * total
    right, total = (int(n) for n in record.extra["organism: benign facts right"].split(" ")[0].split("/"))
    assert right >= 0.98 * total
    # Live and baked are the same edit, so the saved model scores as the trial did before it was saved.
    assert saved.counts == record.selected.test.counts
    assert "with KL <= 0.05" in record.selected.reason
    assert saved.values["kl_divergence"] == pytest.approx(record.selected.test.values["kl_divergence"], rel=1e-3)
    assert {path.name for path in finished.iterdir()} >= {"run.json", "study.journal", "report.html", "model"}
    card = (finished / "model" / "README.md").read_text()
    assert all(word in card for word in ("directional-ablation", "attention", "mlp", "| 110 |", "95 %"))
    # What the truth says, the metric that needs no judge says as well.
    assert saved.counts["evasion_rate"][0] <= 0.2 * saved.counts["evasion_rate"][1]


@pytest.mark.ray
@pytest.mark.slow
def test_the_stages_of_a_run_add_up_to_the_time_of_the_command(command: tuple[Path, float]) -> None:
    path, seconds = command
    found = RunDirectory.open(path).read().timings
    stages = ("program", "prompts", "ray", "model", "directions", "unedited", "study", "finalists", "test", "save")
    assert found.keys() >= {*stages, "truth", "stopping", "report"}
    assert 0.8 * seconds <= sum(found.values()) <= seconds, found


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_is_opened_from_python(finished: Path) -> None:
    run = br.open_run(finished)
    selected = run.record.selected
    assert selected is not None and f"trial {selected.number} is selected" in repr(run)
    assert {trial.number for trial in run.front} <= {trial.number for trial in run.trials}
    prompts = [prompt.user for prompt in load_prompts(run.record.settings).target.test[:8]]
    edited = run.model()
    assert edited.edit == run.edit(selected.number) == br.Edit.from_dict(selected.edit)
    answers, saved = edited.generate(prompts, max_new_tokens=30), run.path / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    for prompt, answer in zip(prompts, answers):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        out = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
        assert tokenizer.decode(out, skip_special_tokens=True) == answer, "what was saved says what is live"
    assert answers != edited.generate(prompts, max_new_tokens=30, edited=False)


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_answers_to_the_other_commands(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["front", str(finished)]) == 0
    assert "40 completed trials" in capsys.readouterr().out
    assert main.main(["report", str(finished)]) == 0
    assert main.main(["save", str(finished), "--auto"]) == 2  # run/model is there already
    assert "exists already" in capsys.readouterr().err
    elsewhere = finished.parent / "elsewhere"
    before, report = RunDirectory.open(finished).read(), (finished / "report.html").read_bytes()
    other = next(n for n in range(40) if n != before.selected.number)
    assert main.main(["save", str(finished), "--trial", str(other), "--to", str(elsewhere)]) == 0
    assert json.loads((elsewhere / "bruno.json").read_text())["trial"] == other
    after = RunDirectory.open(finished).read()
    assert (after.selected, after.extra) == (before.selected, before.extra)
    assert (finished / "report.html").read_bytes() == report
    assert (
        main.main(
            ["run", "--behaviour", "organism", "--output.directory", str(finished.parent), "--study-name", "whole"]
        )
        == 2
    )
    assert "resume" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_that_is_resumed_stays_as_it_is(finished: Path) -> None:
    before = RunDirectory.open(finished).read()
    report = (finished / "report.html").stat().st_mtime_ns
    assert main.main(["resume", str(finished)]) == 0
    assert RunDirectory.open(finished).read() == before and not list(finished.glob("model-*"))
    assert (finished / "report.html").stat().st_mtime_ns > report


@pytest.mark.ray
@pytest.mark.slow
def test_more_trials_can_be_run_afterwards(finished: Path) -> None:
    assert main.main(["resume", str(finished), "--more", "8", "--selection.auto", "false"]) == 0
    assert RunDirectory.open(finished).read().n_trials["COMPLETE"] == 48
    assert not list(finished.glob("model-*"))
    before = RunDirectory.open(finished).read().selected.number
    assert main.main(["resume", str(finished), "--more", "4", "--selection.auto", "true"]) == 0
    selected = RunDirectory.open(finished).read().selected  # another one is saved beside the first, the same is not
    assert selected.saved is not None
    assert Path(selected.saved_path).name == ("model" if selected.number == before else f"model-{selected.number}")


@pytest.mark.slow
def test_a_wheel_holds_every_data_file(tmp_path: Path) -> None:
    """Built as anyone would, installed apart from the source tree, and used through its console script."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    ours = subprocess.run(
        [sys.executable, "-c", "import site; print(site.getsitepackages()[0])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    script = (
        "import sys; sys.path.append(sys.argv.pop(1)); import bruno_ray; from bruno_ray.cli.main import main;"
        " assert bruno_ray.__file__.startswith(sys.prefix), bruno_ray.__file__; raise SystemExit(main(sys.argv[1:]))"
    )

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [str(python), "-c", script, ours, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for file in (
        "serve/config.yaml",
        "serve/pages/chat/page.css",
        "serve/pages/chat/page.js",
        "cluster/scripts/setup_node.sh",
    ):
        assert (Path(packages) / file).is_file(), file
    assert "bruno-ray" in command("--version")
    for behaviour in ("refusal", "verbosity", "hedging", "organism"):
        assert "preset" in command("show-config", "--behaviour", behaviour)
    listing = subprocess.run(
        [
            str(python),
            "-c",
            "import sys; sys.path.append(sys.argv[1]);"
            "from bruno_ray.prompts.sets import load_prompts; from bruno_ray.publishing.environment import environment;"
            "from bruno_ray.settings.sources import load;"
            "environment().get_template('report.html.j2'); environment().get_template('card.md.j2');"
            "print(len(load_prompts(load(['--behaviour=verbosity'], environ={}).settings).target.train))",
            ours,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert listing.returncode == 0, listing.stderr
    assert int(listing.stdout.split()[-1]) > 50

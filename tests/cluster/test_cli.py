"""`bruno-ray cluster` as its user calls it, against the imitation's API (machines without a body).

In this process, since every new one takes seconds to import Ray; one test is of `python -m cluster.cli` itself.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.cli import main
from cluster.cli.creating import created
from cluster.cli.jobs import variable
from cluster.cli.machines import gpu_use
from cluster.cli.runs import progress_view
from cluster.errors import ClusterSettingsError
from cluster.jobs.submitting import RUNS_FOLDER, entrypoint_of
from cluster.setup.bootstrap import MAX_HOURS_VARIABLE
from tests.cluster.fake_vast.api import API_KEY, FakeApi
from tests.cluster.fake_vast.server import FakeServer
from tests.cluster.fake_vast.state import FakeVast
from tests.support.programs import needs

CHECKOUT = Path(__file__).resolve().parents[2]
CLUSTER_YAML = CHECKOUT / "cluster.yaml"
pytestmark = needs("ssh-keygen", package="openssh-client")


@dataclass(frozen=True)
class Done:
    """What a command left: exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Laptop:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.vast = FakeVast()
        self.vast.add_offers(3, gpu_name="RTX 3060", gpu_ram=12288.0, dph_base=0.06)
        self.vast.add_offers(4)
        self.api = FakeApi(self.vast)
        self.server = FakeServer(self.api)
        keys = home / ".bruno-ray"
        keys.mkdir(mode=0o700)
        for name in ("vast_api_key", "vast_api_key_head"):
            (keys / name).write_text(API_KEY)

        for name, value in {"HOME": str(home), "VAST_URL": self.server.url, "COLUMNS": "200"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("VAST_API_KEY", raising=False)
        monkeypatch.chdir(CHECKOUT)
        monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
        monkeypatch.setattr("cluster.jobs.session.WAIT_S", 0.0)  # nobody comes where there are no bodies

    def run(self, *words: str, config: Path = CLUSTER_YAML) -> Done:
        """`main` in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([words[0], "--config", str(config), *words[1:]])
        return Done(code, out.getvalue(), err.getvalue())

    def run_process(self, *words: str) -> Done:
        """`python -m cluster.cli` in one of its own."""
        command = [sys.executable, "-m", "cluster.cli", words[0], "--config", str(CLUSTER_YAML), *words[1:]]
        done = subprocess.run(command, env=dict(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)

    def created(self) -> list[str]:
        return [path for method, path, *_ in self.api.requests if method == "PUT" and "/asks/" in path]


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laptop]:
    laptop = Laptop(tmp_path, monkeypatch)
    yield laptop
    laptop.server.close()
    laptop.vast.close()


def test_list_shows_offers_with_price_and_disk_and_why_not(laptop: Laptop, tmp_path: Path) -> None:
    done = laptop.run("list", "--type", "rtx4090")
    assert done.returncode == 0, done.stderr
    assert "rtx4090: 4 offers" in done.stdout
    for offer in laptop.vast.free_offers():
        assert (str(offer.id) in done.stdout) == (offer.gpu_name == "RTX 4090")
    everything = laptop.run("list")
    assert everything.returncode == 0 and "head: " in everything.stdout
    laptop.vast.add_offers(1, gpu_name="H100 SXM")
    scarce = tmp_path / "scarce.yaml"
    config = yaml.safe_load(CLUSTER_YAML.read_text())
    config["available_node_types"]["rtx4090"]["node_config"]["requirements"]["num_gpus"] = 8
    scarce.write_text(yaml.safe_dump(config))
    nothing = laptop.run("list", "--type", "rtx4090", config=scarce)
    assert "rtx4090: 0 offers" in nothing.stdout and "num_gpus excludes 4" in nothing.stdout


def test_the_command_of_its_own_does_the_same(laptop: Laptop) -> None:
    done = laptop.run_process("list", "--type", "rtx9090")
    assert done == laptop.run("list", "--type", "rtx9090")
    assert done.returncode == 2 and "no node type" in done.stderr and done.stderr.count("\n") == 1


def test_up_says_what_it_would_rent_and_refuses_without_a_yes(laptop: Laptop) -> None:
    done = laptop.run("up")
    assert done.returncode == 2
    assert "head: rents offer" in done.stdout and "$/h" in done.stdout
    assert "budget: at most 3.00 $/h, 40.00 $ in total" in done.stdout
    assert "add --yes" in done.stderr and done.stderr.count("\n") == 1
    assert laptop.created() == [] and laptop.vast.billed() == []


def test_up_says_what_the_account_has_and_refuses_where_that_does_not_last(laptop: Laptop) -> None:
    laptop.vast.credit = 20.0
    done = laptop.run("up")
    assert "$ within 4 h; the account has 20.00 $" in done.stdout
    laptop.vast.credit = 3.0
    done = laptop.run("up", "--yes")
    assert done.returncode == 2 and laptop.created() == []
    assert "the account has 3.00 $" in done.stderr and "--max-hours" in done.stderr and done.stderr.count("\n") == 1


def test_up_goes_on_where_a_card_is_charged(laptop: Laptop, tmp_path: Path) -> None:
    config = yaml.safe_load(CLUSTER_YAML.read_text())
    config["provider"]["budget"]["credit_must_cover"] = False
    config["file_mounts"] = {}
    charged = tmp_path / "charged.yaml"
    charged.write_text(yaml.safe_dump(config))
    laptop.vast.credit = 1.0
    done = laptop.run("up", config=charged)
    assert "the account has 1.00 $" in done.stdout and "add --yes" in done.stderr


def test_up_for_less_time_costs_less(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_HOURS_VARIABLE, "")  # restored afterwards
    laptop.vast.credit = 3.0
    done = laptop.run("up", "--max-hours", "1")
    assert "and 1 h" in done.stdout and "within 1 h; the account has 3.00 $" in done.stdout
    assert "add --yes" in done.stderr


def test_up_estimates_time_and_money_before_it_asks(laptop: Laptop) -> None:
    """The head's offer costs 0.06 + 0.0002 x 76 $/h; each of four workers downloads 6 + 16 GB at 900 Mbit/s."""
    done = laptop.run("up", "--trials", "400", "--trial-seconds", "36")
    line = next(line for line in done.stdout.splitlines() if line.startswith("estimate: "))
    assert "head ready after 7 min, 4 workers with their model 9 min later" in line
    assert "400 trials x 36 s on 4 GPUs 60 min; 76 min in all" in line and "MORE" not in line
    machines, downloads, total = map(float, re.findall(r"(\d+\.\d\d) \$", line))
    assert machines == pytest.approx(1.27 * 0.075 + 4 * 0.36 * 1.15, rel=0.05)
    assert (downloads, total) == (
        pytest.approx(0.006 + 4 * 0.022, abs=0.01),
        pytest.approx(machines + downloads, abs=0.02),
    )
    assert "MORE than the 40.00 $" in laptop.run("up", "--trials", "90000", "--trial-seconds", "36").stdout
    wrong = laptop.run("up", "--trials", "0")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and laptop.created() == []


def test_progress_says_what_trials_cost_and_the_next_estimate_knows_what_they_take(laptop: Laptop) -> None:
    answer = {"name": "r", "states": {"COMPLETE": 200}, "target": 200, "running": True, "unedited": {}, "front": []}
    answer |= {"objectives": [], "cost": 4.2, "trial_seconds": 31.0, "selected": None}

    class Head:
        def run(self, command: str, *, input: str = "") -> str:
            return json.dumps(answer)

    def shown() -> str:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(progress_view(Head(), "r", laptop.home / ".bruno-ray/clusters/bruno"))
        return console.export_text()

    assert "200 trials" not in laptop.run("up").stdout
    assert "cost of this run so far: 4.20 $, 0.0210 $ for each completed trial" in shown()
    assert "200 trials x 31 s on 4 GPUs" in laptop.run("up").stdout
    answer |= {"running": False, "selected": 57}
    assert "cost of its result (trial 57): 4.20 $, 0.0210 $ for each" in shown()


def test_create_is_up_with_so_many_of_one_gpu(laptop: Laptop) -> None:
    laptop.vast.add_offers(3, gpu_name="H100 SXM", dph_base=2.0)
    laptop.vast.credit = 60.0
    done = laptop.run("create", "H100_SXM", "3", "--hours", "6", "--budget", "45")
    assert "h100_sxm: 3 workers from the beginning, up to 3" in done.stdout and "1 x H100 SXM" in done.stdout
    assert "budget: at most 7.50 $/h, 45.00 $ in total and 6 h" in done.stdout
    assert "rtx4090" not in done.stdout and "add --yes" in done.stderr and laptop.created() == []
    laptop.vast.credit = 30.0
    assert "the account has 30.00 $" in laptop.run("create", "H100_SXM", "3", "--hours", "6", "--budget", "45").stderr
    done = laptop.run("create", "RTX_4090", "0")
    assert done.returncode == 2 and "at least 1" in done.stderr


def test_create_keeps_what_cluster_yaml_says_of_such_a_gpu() -> None:
    config = yaml.safe_load(CLUSTER_YAML.read_text())
    words = argparse.Namespace(gpu="RTX_4090", count=2, hours=None, budget=None, model="org/model")
    made = created(config, CHECKOUT, words)
    kind = made["available_node_types"]["rtx_4090"]
    assert kind["node_config"]["requirements"]["max_price_per_hour"] == 0.6
    assert kind["node_config"]["model"] == "org/model" and "model_size_gb" not in kind["node_config"]
    assert (kind["min_workers"], made["max_workers"], set(made["available_node_types"])) == (2, 2, {"head", "rtx_4090"})
    assert Path(made["file_mounts"]["~/bruno-ray/cluster"]).is_dir()
    assert config == yaml.safe_load(CLUSTER_YAML.read_text())


def test_the_doctor_asks_first_and_destroys_what_it_rents(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The imitation's machines have no body here, so that no command comes back: that is a fact as well."""
    assert laptop.run("doctor").returncode == 2 and laptop.created() == []
    monkeypatch.setattr("cluster.cli.doctor.POLL_S", 0.1)
    monkeypatch.setattr("cluster.cli.doctor.COMMANDS_S", 0.1)
    monkeypatch.setattr("cluster.network.probe.GREETING_S", 0.1)
    laptop.vast.boot_s = 1.0
    done = laptop.run("doctor", "--yes")
    assert done.returncode == 1 and "no address runs a command" in done.stdout, done.stderr
    assert len(laptop.created()) == 1 and laptop.vast.billed() == []
    facts = json.loads((laptop.home / ".bruno-ray/clusters/bruno/doctor.json").read_text())
    assert facts["ports"] == ["22/tcp"] and facts["destroyed twice without an error"]
    assert facts["shown after its end"] is False and "running" in facts["seconds to each status"]


def test_status_shows_credit_and_what_ends(laptop: Laptop) -> None:
    offer = laptop.vast.free_offers()[0]
    offer.duration = 7200.0
    laptop.vast.rent(offer.id, {"image": "x", "disk": 10, "label": "bruno-ray:bruno:h0:up-to-date", "env": {}})
    laptop.vast.credit = 0.05
    done = laptop.run("status")
    assert "credit: 0.05 $, 0." in done.stdout and "ends in 2.0 h" in done.stdout, done.stdout


def test_a_paused_cluster_says_what_it_costs_and_what_goes_on_with_it(laptop: Laptop) -> None:
    offer = laptop.vast.free_offers()[0]
    head = laptop.vast.rent(offer.id, {"image": "x", "disk": 100, "label": "bruno-ray:bruno:h0:up-to-date", "env": {}})
    assert head is not None
    head.label += f"::::0.5000@{laptop.vast.clock.time():.0f}+0p"
    laptop.vast.stop(head)
    per_day = f"{24 * head.storage_price:.2f} $ a day"
    status = laptop.run("status").stdout
    assert "paused, up-to-date" in status and f"cost: {head.storage_price:.3f} of 3.00 $/h, 0.50 of" in status
    again = laptop.run("pause")
    assert again.returncode == 0 and "is stopped already" in again.stdout and per_day in again.stdout
    for words in (["progress"], ["fetch"], ["down", "--yes"], ["stop", "--yes"]):
        done = laptop.run(*words)
        assert done.returncode == 2 and "`bruno-ray cluster up` starts it again" in done.stderr, done.stdout
    assert laptop.vast.billed() == [head]
    up = laptop.run("up")
    assert up.returncode == 2 and f"instance {head.id} at" in up.stdout and "is started again; nothing" in up.stdout
    laptop.vast.place_is_taken(head.id, True)
    laptop.api._shapes = itertools.repeat(1)  # Vast.ai refuses at once
    refused = laptop.run("up", "--yes")
    assert refused.returncode == 2 and "cannot be started now" in refused.stderr, refused.stderr
    assert laptop.created() == [] and laptop.vast.status(head) == "stopped"


def test_pause_without_a_cluster_or_a_way_to_the_head_does_nothing(laptop: Laptop) -> None:
    assert "is not up" in laptop.run("pause", "--yes").stderr
    offer = laptop.vast.free_offers()[0].id
    head = laptop.vast.rent(offer, {"image": "x", "disk": 10, "label": "bruno-ray:bruno:h0:up-to-date", "env": {}})
    assert head is not None
    done = laptop.run("pause", "--yes")
    assert done.returncode == 2 and "does not answer" in done.stderr
    assert laptop.vast.status(head) != "stopped"


def test_logs_of_an_instance_are_fetched_without_our_key_and_cannot_steer_the_terminal(laptop: Laptop) -> None:
    """The imitated storage refuses whoever sends a key, and has the text only when it is asked again."""
    offer = laptop.vast.free_offers()[0].id
    rented = laptop.vast.rent(offer, {"image": "x", "disk": 10, "label": "bruno-ray:bruno:h0", "env": {}})
    assert rented is not None
    laptop.api.logs[rented.id, "logs"] = "one\ntwo \x1b[2Jwiped\nthree"
    laptop.api.logs[rented.id, "daemon_logs"] = "pulling"
    done = laptop.run("logs", str(rented.id), "--tail", "2")
    assert (done.returncode, done.stdout) == (0, "two [2Jwiped\nthree\n"), done.stderr
    assert laptop.run("logs", str(rented.id), "--host").stdout == "pulling\n"
    laptop.vast.destroy(rented.id)
    gone = laptop.run("logs", str(rented.id))
    assert gone.returncode == 2 and "Invalid instance id" in gone.stderr and gone.stderr.count("\n") == 1
    assert "not up" in laptop.run("logs", "raysubmit_1").stderr, "anything else is a job"


def test_up_rents_nothing_when_a_mount_is_missing(laptop: Laptop, tmp_path: Path) -> None:
    away = tmp_path / "cluster.yaml"
    away.write_text(CLUSTER_YAML.read_text())
    done = laptop.run("up", "--yes", config=away)
    assert done.returncode == 2 and "file_mounts: bruno_ray" in done.stderr
    assert laptop.created() == []


def test_commands_say_that_there_is_no_cluster(laptop: Laptop) -> None:
    laptop.vast.rent(
        laptop.vast.free_offers()[0].id, {"image": "x", "disk": 10, "label": "bruno-ray:other:h0", "env": {}}
    )
    for words in (["down", "--yes"], ["status"]):
        done = laptop.run(*words)
        assert done.returncode == 0 and "nothing is billed" in done.stdout, done.stderr
    done = laptop.run("fetch")
    assert done.returncode == 2 and "not up" in done.stderr
    assert len(laptop.vast.billed()) == 1, "another cluster's machine is left alone"


def test_a_head_that_cannot_be_asked_is_not_destroyed_unless_its_content_is_given_up(laptop: Laptop) -> None:
    offer = laptop.vast.free_offers()[0].id
    laptop.vast.rent(offer, {"image": "x", "disk": 10, "label": "bruno-ray:bruno:h0:up-to-date", "env": {}})
    done = laptop.run("down", "--yes")
    assert done.returncode == 2 and "nothing was destroyed" in done.stderr
    assert len(laptop.vast.billed()) == 1


def test_wrong_words_are_one_line_and_exit_code_2(laptop: Laptop, tmp_path: Path) -> None:
    broken = tmp_path / "cluster.yaml"
    broken.write_text(yaml.safe_dump({"cluster_name": "bruno"}))
    for words, config, said in (
        (["status"], tmp_path / "none.yaml", "cannot be read"),
        (["status"], broken, "has no provider"),
        (["list", "--type", "rtx9090"], CLUSTER_YAML, "no node type"),
    ):
        done = laptop.run(*words, config=config)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_building_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import argparse, sys, cluster.cli; cluster.cli.add_arguments(argparse.ArgumentParser());"
        "print(sorted({'ray', 'torch', 'httpx', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_of_a_job_keeps_its_words() -> None:
    assert entrypoint_of(["--", "bruno-ray", "run", "a b"]) == RUNS_FOLDER + "bruno-ray run 'a b'"
    assert entrypoint_of(["echo $HOME && true"]) == RUNS_FOLDER + "echo $HOME && true"


def test_gpu_use_reads_nvidia_smi() -> None:
    assert gpu_use("97, 20582, 24564\n3, 512, 24564\n") == "97 %, 20.1/24.0 GB; 3 %, 0.5/24.0 GB"
    assert gpu_use("") == "-"


def test_a_variable_for_the_job_is_given_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "secret=1")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert variable("A=b=c") == ("A", "b=c") and variable("A=") == ("A", "")
    assert variable("FROM_HERE") == ("FROM_HERE", "secret=1")
    for wrong in ("NOWHERE", "=x", ""):
        with pytest.raises(ClusterSettingsError, match="--env"):
            variable(wrong)


def test_the_password_of_a_study_elsewhere_goes_to_the_head_by_standard_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = "postgresql://me:w0rd@db.example/studies"
    asked = {}

    class Head:
        def run(self, command: str, *, input: str = "") -> str:
            asked.update(command=command, input=input)
            shell = ["bash", "-c", command.replace("python -m cluster.jobs.at_head progress", "env #")]
            asked["seen"] = subprocess.run(shell, input=input, capture_output=True, text=True, check=True).stdout
            numbers = {"states": {"COMPLETE": 3, "RUNNING": 1}, "target": 9, "running": True}
            return json.dumps({"name": "r", **numbers, "unedited": {}, "front": [], "objectives": []})

    monkeypatch.setenv("BRUNO_STUDY__STORAGE", whole)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(progress_view(Head(), "r", tmp_path))
    assert "r: 3/9 trials complete, 1 running" in console.export_text()
    assert whole not in asked["command"] and f"BRUNO_STUDY__STORAGE={whole}" in asked["seen"].splitlines()

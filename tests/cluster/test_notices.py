"""Who does not look is told: once of each event, by a real command or HTTP server, and never at the price of work.

The secret of a webhook's address is `SECRET` here; no log, error or configuration may hold it.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.node_launch_exception import NodeLaunchException

from cluster import supervisor
from cluster.cli import main
from cluster.errors import ClusterSettingsError, NotifyError
from cluster.network.keys import ensure_key_pair
from cluster.network.mesh import Mesh, Node
from cluster.network.ssh_master import SshIdentity
from cluster.node_provider import VastNodeProvider
from cluster.notices.notices import Notices
from cluster.notices.runs import RunWatch
from cluster.notices.sending import Notice, post, run_command, send
from cluster.settings import ClusterSettings, NotifySettings
from cluster.setup.bootstrap import bootstrapped
from cluster.setup.mounts import NOTIFY_MOUNT
from tests.cluster.fake_vast.api import Fault
from tests.cluster.fake_vast.clock import VirtualClock
from tests.cluster.fake_vast.cluster import NODE_CONFIG, ImitatedCluster, head_tags
from tests.support.finished_run import make
from tests.support.provider_helpers import READY, create_worker, later
from tests.support.waiting import wait_for

SECRET = "T0secret/B0secret/Xsecret"
PATIENCE_S = 60.0
NOTICE = Notice("test", "demo", "something\nhappened", 1_800_000_000.0)


class Webhook:
    """An HTTP server that keeps what it is sent, and answers what it is told to."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.status = 200
        self.silent = threading.Event()
        """While clear, nothing is answered."""
        self.silent.set()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                webhook.silent.wait()
                webhook.paths.append(self.path)
                webhook.received.append(json.loads(body))
                self.send_response(webhook.status)
                self.send_header("location", "/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """`paths` is the log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/services/{SECRET}"

    def events(self) -> list[str]:
        return [body["event"] for body in self.received]

    def close(self) -> None:
        self.silent.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with contextlib.closing(Webhook()) as webhook:
        yield webhook


@pytest.fixture(autouse=True)
def nothing_tells_the_secret(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="filelock")  # two lines for each lock
    yield
    assert "secret" not in caplog.text


def settled(provider: VastNodeProvider) -> None:
    assert provider.notices.flush(PATIENCE_S)


class TestSending:
    def test_a_webhook_gets_what_slack_and_discord_read(self, webhook: Webhook) -> None:
        post(webhook.url, NOTICE)
        [body] = webhook.received
        assert webhook.paths == [f"/services/{SECRET}"]
        assert body["text"] == body["content"] == "bruno-ray cluster demo: something happened"
        assert (body["event"], body["cluster"], body["time"]) == ("test", "demo", 1_800_000_000)

    def test_a_command_gets_the_text_on_standard_input_and_in_its_environment(self, tmp_path: Path) -> None:
        run_command(
            f'cat > {tmp_path}/in; echo "$CLUSTER_EVENT $CLUSTER_NAME $CLUSTER_MESSAGE" > {tmp_path}/env', NOTICE
        )
        text = "bruno-ray cluster demo: something happened"
        assert (tmp_path / "in").read_text() == f"{text}\n"
        assert (tmp_path / "env").read_text() == f"test demo {text}\n"

    @pytest.mark.parametrize("status", [302, 404, 500])
    def test_a_refusal_names_the_host_alone(self, webhook: Webhook, status: int) -> None:
        webhook.status = status
        with pytest.raises(NotifyError) as caught:
            post(webhook.url, NOTICE)
        assert str(caught.value) == f"notify.webhook at 127.0.0.1 answers {status}"
        assert "/elsewhere" not in webhook.paths

    def test_nobody_there_is_one_error_without_the_address(self) -> None:
        with pytest.raises(NotifyError) as caught:
            post(f"http://127.0.0.1:9/{SECRET}", NOTICE)
        assert "127.0.0.1 did not take it" in str(caught.value) and "secret" not in str(caught.value)
        assert caught.value.__context__ is None, "a traceback would show httpx's error"

    def test_a_command_that_hangs_is_killed_with_its_children(self, tmp_path: Path) -> None:
        noted = tmp_path / "pid"
        for timeout_s in (0.3, 3.0, 30.0):  # a busy machine has perhaps not begun it when its time is over
            with pytest.raises(NotifyError, match="did not end within"):
                run_command(f"sleep 1000 & echo $! > {noted}.new; mv {noted}.new {noted}; wait", NOTICE, timeout_s)
            if noted.exists():
                break
        child = Path("/proc") / noted.read_text().strip()
        wait_for(lambda: not child.exists() or ") Z " in (child / "stat").read_text(), "the end of its child")

    def test_one_that_fails_does_not_keep_the_text_from_the_other(self, webhook: Webhook) -> None:
        settings = NotifySettings(command=f"echo {SECRET}; exit 3", webhook=webhook.url)
        with pytest.raises(NotifyError, match="ended with 3"):
            send(NOTICE, settings)
        assert webhook.events() == ["test"]

    @pytest.mark.parametrize("address", ["hooks.slack.com/secret", "ftp://x/secret", "https:///secret", "secret"])
    def test_what_is_no_address_is_refused_without_repeating_it(self, address: str) -> None:
        with pytest.raises(ClusterSettingsError) as caught:
            ClusterSettings.from_provider({"notify": {"webhook": address}})
        assert "provider.notify.webhook" in str(caught.value) and "secret" not in str(caught.value)


class TestOnce:
    @pytest.fixture
    def settings(self, webhook: Webhook) -> ClusterSettings:
        return ClusterSettings.from_provider({"notify": {"webhook": webhook.url}})

    def notices(self, folder: Path, settings: ClusterSettings) -> Notices:
        return Notices(folder, "demo", settings, VirtualClock())

    def test_an_event_is_told_once_also_by_the_next_process(
        self, webhook: Webhook, settings: ClusterSettings, tmp_path: Path
    ) -> None:
        first = self.notices(tmp_path, settings)
        for _ in range(5):
            first.tell("budget", "80 %", "40")
        first.tell("budget", "80 % of more", "60")
        assert first.flush(PATIENCE_S)
        second = self.notices(tmp_path, settings)
        second.tell("budget", "80 %", "40")
        second.arm("budget", "60")
        second.tell("budget", "again", "60")
        assert second.flush(PATIENCE_S)
        told = [body["text"].partition(": ")[2] for body in webhook.received]
        assert told == ["80 %", "80 % of more", "again"]

    def test_telling_never_waits(self, webhook: Webhook, settings: ClusterSettings, tmp_path: Path) -> None:
        webhook.silent.clear()
        notices = self.notices(tmp_path, settings)
        notices.tell("budget", "first")
        notices.tell("limit", "second")
        assert webhook.received == [] and not notices.flush(0.1), "both calls came back before anybody had answered"
        webhook.silent.set()
        assert notices.flush(PATIENCE_S) and webhook.events() == ["budget", "limit"]

    def test_a_failure_is_tried_again_logged_once_and_then_left_alone(
        self, webhook: Webhook, settings: ClusterSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        webhook.status = 503
        notices = self.notices(tmp_path, settings)
        for _ in range(3):
            notices.tell("budget", "80 %")
            notices.tell("limit", "over")
        assert notices.flush(PATIENCE_S)
        assert webhook.events() == ["budget"] * 4 + ["limit"] * 4
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert [record.getMessage() for record in errors] == [
            "notify.webhook at 127.0.0.1 answers 503, which was to be told of: 80 %"
        ]
        webhook.status = 200
        notices.tell("budget", "80 %")
        notices.tell("credit-low", "0.10 dollars")
        assert notices.flush(PATIENCE_S) and webhook.events()[8:] == ["credit-low"]

    def test_what_cannot_be_noted_breaks_nothing(
        self, webhook: Webhook, settings: ClusterSettings, tmp_path: Path
    ) -> None:
        (tmp_path / "notices.json").mkdir()
        notices = self.notices(tmp_path, settings)
        notices.tell("budget", "80 %")
        notices.tell("budget", "80 %")
        assert notices.flush(PATIENCE_S) and webhook.events() == ["budget"]

    def test_without_anybody_to_tell_nothing_is_kept(self, tmp_path: Path) -> None:
        notices = self.notices(tmp_path, ClusterSettings())
        notices.tell("budget", "80 %")
        notices.flush(PATIENCE_S)
        assert list(tmp_path.iterdir()) == []


class TestEvents:
    def test_the_head_tells_of_a_budget_that_is_nearly_spent_and_of_its_end(
        self, world: ImitatedCluster, webhook: Webhook
    ) -> None:
        head = world.autoscaler(budget={"max_total_cost": 0.3}, notify={"webhook": webhook.url})
        head.set_node_tags(create_worker(head), READY)
        while not webhook.received and world.vast.cost() < 0.3:
            later(world, 20, head, step=20)
            settled(head)
        assert webhook.events() == ["budget"] and "(80%)" in webhook.received[0]["text"]
        assert world.vast.cost() == pytest.approx(0.24, abs=0.01)
        later(world, 900, head, step=20)
        settled(head)
        assert webhook.events() == ["budget", "limit"] and "cluster down" in webhook.received[1]["text"]

    def test_ten_minutes_without_a_machine_are_told_once_until_one_is_rented(
        self, world: ImitatedCluster, webhook: Webhook
    ) -> None:
        head = world.autoscaler(notify={"webhook": webhook.url})
        for offer in world.vast.free_offers():
            offer.hidden = True

        def asked_for(seconds: float) -> None:
            for _ in range(int(seconds / 60)):
                with pytest.raises(NodeLaunchException):
                    create_worker(head)
                later(world, 60, head, step=60)
            settled(head)

        asked_for(590)
        assert webhook.events() == []
        asked_for(1200)
        assert webhook.events() == ["nothing-to-rent"] and "10 minutes" in webhook.received[0]["text"]
        later(world, 700, head, step=60)
        world.vast.add_offers(1)
        create_worker(head)
        asked_for(1200)
        assert webhook.events() == ["nothing-to-rent"] * 2

    def test_a_budget_with_no_room_beside_workers_is_no_drought(self, world: ImitatedCluster, webhook: Webhook) -> None:
        head = world.autoscaler(budget={"max_price_per_hour": 0.5}, notify={"webhook": webhook.url})
        head.set_node_tags(create_worker(head), READY)
        for _ in range(15):
            with pytest.raises(NodeLaunchException, match="max_price_per_hour"):
                create_worker(head)
            later(world, 60, head, step=60)
        settled(head)
        assert webhook.events() == []

    def test_credit_that_is_low_is_told_and_again_the_next_time(self, world: ImitatedCluster, webhook: Webhook) -> None:
        head = world.autoscaler(notify={"webhook": webhook.url})
        head.set_node_tags(create_worker(head), READY)
        for credit, told in ((0.5, 1), (100.0, 1), (0.6, 2)):
            world.vast.credit = world.vast.cost() + credit
            later(world, 700, head, step=20)
            settled(head)
            assert webhook.events() == ["credit-low"] * told

    def test_an_account_without_credit_is_told_by_what_refuses(self, world: ImitatedCluster, webhook: Webhook) -> None:
        head = world.autoscaler(notify={"webhook": webhook.url})
        world.vast.credit = 0.0
        with pytest.raises(NodeLaunchException, match="no credit"):
            create_worker(head)
        settled(head)
        assert webhook.events() == ["credit-low"]

    @pytest.mark.parametrize("fate", ["deletes", "stops", "silent"])
    def test_the_laptop_tells_of_a_head_that_is_lost(self, world: ImitatedCluster, webhook: Webhook, fate: str) -> None:
        laptop = world.provider("laptop", notify={"webhook": webhook.url})
        [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
        assert laptop.losses() == [], "it is being set up"
        laptop.set_node_tags(head, READY)
        later(world, 60, laptop)
        assert laptop.losses() == []
        happen = {"deletes": world.vast.host_deletes, "stops": world.vast.outbid, "silent": world.vast.host_offline}
        happen[fate](int(head))
        later(world, 60, laptop)
        laptop = world.provider("laptop", notify={"webhook": webhook.url})
        first = laptop.losses()
        assert (first == []) == (fate == "silent"), "a host may come back within minutes"
        later(world, 200, laptop)
        for _ in range(3):
            [loss] = laptop.losses()
        assert f"head {head}" in loss
        settled(laptop)
        assert webhook.events() == ["head-lost"]

    def test_a_head_that_is_taken_down_is_not_lost(self, world: ImitatedCluster, webhook: Webhook) -> None:
        laptop = world.provider("laptop", notify={"webhook": webhook.url})
        [head] = laptop.create_node(NODE_CONFIG, head_tags(), 1)
        laptop.set_node_tags(head, READY)
        later(world, 60, laptop)
        assert laptop.losses() == []
        laptop.terminate_nodes(laptop.nodes_for_teardown({}))
        assert laptop.losses() == []
        settled(laptop)
        assert webhook.events() == []

    def test_an_outage_of_the_api_is_no_loss_and_costs_the_autoscaler_nothing(
        self, world: ImitatedCluster, webhook: Webhook
    ) -> None:
        head = world.autoscaler(notify={"webhook": webhook.url})
        head.set_node_tags(create_worker(head), READY)
        world.api.outage, world.api.outage_path = Fault.SERVER_ERROR, "/users/"
        later(world, 650, head, step=30)
        settled(head)
        assert webhook.events() == [] and len(head.non_terminated_nodes({})) == 2

    def test_a_run_that_ends_is_told_once_for_each_time_it_was_under_way(
        self, tmp_path: Path, webhook: Webhook
    ) -> None:
        settings = ClusterSettings.from_provider({"notify": {"webhook": webhook.url}})
        notices = Notices(tmp_path, "demo", settings, VirtualClock())
        run = tmp_path / "runs" / "mine"
        make(run, n_trials=3)
        watch = RunWatch(tmp_path / "runs", notices)
        watch.look()
        for _ in range(2):
            with open(run / ".driver.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                watch.look()
                watch.look()
            for _ in range(3):
                watch.look()
        assert notices.flush(PATIENCE_S)
        assert webhook.events() == ["run-ended"] * 2
        assert "run mine has ended: " in webhook.received[0]["text"] and "selected" in webhook.received[0]["text"]

    @pytest.mark.parametrize("broken", [False, True])
    def test_the_supervisor_looks_at_runs_and_goes_on_where_that_fails(
        self, tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch, broken: bool
    ) -> None:
        monkeypatch.setattr(supervisor, "RUNS_S", 0.02)
        monkeypatch.setattr(supervisor, "STATUS_S", 0.02)
        settings = ClusterSettings.from_provider({"notify": {"webhook": webhook.url}})
        watch = RunWatch(tmp_path / "runs", Notices(tmp_path, "demo", settings, VirtualClock()))
        if broken:
            monkeypatch.setattr(watch, "look", lambda: 1 / 0)
        make(tmp_path / "runs" / "mine", n_trials=1)
        mesh = Mesh(tmp_path, SshIdentity(tmp_path / "key", tmp_path / "hosts"), 8, "star")
        watched = supervisor.Supervisor(tmp_path, mesh, lambda: [Node("1", 0, ())], [lambda: watch.look()])

        async def live() -> None:
            with open(tmp_path / "runs" / "mine" / ".driver.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                running = asyncio.create_task(watched.run())
                while not broken and not watch._running:
                    await asyncio.sleep(0.01)
            while not broken and not webhook.received:
                await asyncio.sleep(0.01)
            written = supervisor.read_status(tmp_path).get("written", 0.0)
            while supervisor.read_status(tmp_path).get("written", 0.0) == written:
                await asyncio.sleep(0.01)
            assert not running.done()
            running.cancel()

        asyncio.run(asyncio.wait_for(live(), PATIENCE_S))
        assert webhook.events() == ([] if broken else ["run-ended"])


class TestConfiguration:
    @pytest.fixture
    def config(self, tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        monkeypatch.setenv("HOME", str(tmp_path))
        keys = tmp_path / ".bruno-ray"
        keys.mkdir()
        (keys / "vast_api_key_head").write_text("key")
        config = yaml.safe_load((Path(__file__).resolve().parents[2] / "cluster.yaml").read_text())
        config["provider"]["notify"] = {"webhook": webhook.url, "command": "mail -s $SECRET_secret"}
        ensure_key_pair(keys / "clusters" / "bruno", "bruno")
        return config

    def test_ray_which_logs_its_configuration_gets_no_secret(self, config: dict[str, Any], webhook: Webhook) -> None:
        complete = bootstrapped(config)
        assert "secret" not in json.dumps(complete)
        settings = ClusterSettings.from_provider(complete["provider"])
        told = settings.who_to_notify()
        assert told.webhook is not None and told.webhook.get_secret_value() == webhook.url
        assert settings.notify_file is not None and settings.notify_file.stat().st_mode & 0o77 == 0
        assert "secret" not in repr(told.webhook)

    def test_the_head_alone_gets_the_file(self, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VAST_API_KEY", "key")
        complete = bootstrapped(config)
        provider = VastNodeProvider(complete["provider"], complete["cluster_name"])
        on_head = provider.prepare_for_head_node(complete)
        assert NOTIFY_MOUNT in complete["file_mounts"] and NOTIFY_MOUNT not in on_head["file_mounts"]
        assert on_head["provider"]["notify_file"] == NOTIFY_MOUNT
        assert "secret" not in json.dumps(on_head)

    def test_taken_out_of_the_file_it_is_gone_from_the_disk(self, config: dict[str, Any], tmp_path: Path) -> None:
        complete = bootstrapped(config)
        del config["provider"]["notify"]
        assert "notify_file" not in bootstrapped(config)["provider"]
        assert not Path(complete["provider"]["notify_file"]).exists()

    def test_the_command_line_tries_it(
        self, config: dict[str, Any], webhook: Webhook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "cluster.yaml"
        config["provider"]["notify"]["command"] = f"cat > {tmp_path}/told"
        (tmp_path / ".bruno-ray" / "vast_api_key").write_text("key")

        def notify() -> tuple[int, str]:
            file.write_text(yaml.safe_dump(config))
            code = main(["notify", "--config", str(file), "hello"])
            said = capsys.readouterr()
            assert "secret" not in said.out + said.err
            return code, said.out + said.err

        assert notify() == (0, "told the command and the webhook at 127.0.0.1\n")
        assert (tmp_path / "told").read_text() == webhook.received[0]["text"] + "\n"
        webhook.status = 404
        assert notify() == (2, "error: notify.webhook at 127.0.0.1 answers 404\n")
        del config["provider"]["notify"]
        code, said = notify()
        assert code == 2 and "names nobody" in said

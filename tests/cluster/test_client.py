"""The client against the imitation: what is retried, what is final, and what "could not ask" looks like."""

from pathlib import Path

import pytest

from cluster.vast.client import VastClient
from cluster.vast.errors import (
    CreateFailedError,
    CreateUncertainError,
    OfferTakenError,
    VastAuthError,
    VastCreditError,
    VastQuotaError,
    VastRefusedError,
    VastUnavailableError,
)
from cluster.vast.models import CreateRequest, Instance, State
from cluster.vast.pace import Pace
from tests.cluster.fake_vast.answers import Answer, instance_gone, offer_gone
from tests.cluster.fake_vast.api import API_KEY, HEAD_KEY, FakeApi, Fault
from tests.cluster.fake_vast.clock import VirtualClock
from tests.cluster.fake_vast.cluster import ODD_ROWS
from tests.cluster.fake_vast.rates import too_frequent
from tests.cluster.fake_vast.server import FakeServer
from tests.cluster.fake_vast.state import FakeVast
from tests.cluster.fake_vast.transport import FakeTransport


def request(label: str = "bruno-ray:test:w1", price: float | None = None) -> CreateRequest:
    return CreateRequest(image="image", disk=50.0, label=label, env={"A": "1"}, onstart="true", price=price)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def api(clock: VirtualClock) -> FakeApi:
    vast = FakeVast(clock, boot_s=30.0)
    vast.add_offers(60)
    return FakeApi(vast)


@pytest.fixture
def client(api: FakeApi, clock: VirtualClock) -> VastClient:
    return VastClient("https://vast.invalid", API_KEY, transport=FakeTransport(api), clock=clock)


def test_an_instance_is_rented_boots_and_is_destroyed(client: VastClient, api: FakeApi, clock: VirtualClock) -> None:
    offer = client.search_offers({"allocated_storage": 50.0}).offers[0]
    contract = client.create_instance(offer.id, request())
    [booting] = client.instances()
    assert (booting.id, booting.state, booting.label, booting.extra_env) == (
        contract,
        State.BOOTING,
        "bruno-ray:test:w1",
        {"A": "1"},
    )
    clock.sleep(31)
    running = client.instance(contract)
    assert running is not None and running.state is State.RUNNING
    direct, proxy = running.ssh_endpoints
    assert direct.host == running.public_ipaddr and not direct.host.endswith(" ")
    assert proxy.host == running.ssh_host
    assert running.dph_total == pytest.approx(offer.dph_total)
    client.destroy_instance(contract)
    assert client.instances() == [] and client.instance(contract) is None and api.vast.billed() == []


def test_every_page_of_the_list_is_read(client: VastClient) -> None:
    created = [client.create_instance(offer.id, request()) for offer in client.search_offers({"limit": 60}).offers]
    assert [instance.id for instance in client.instances()] == sorted(created)
    assert len(created) == 60


@pytest.mark.parametrize("fault", [Fault.TOO_FREQUENT, Fault.SERVER_ERROR, Fault.GARBAGE, Fault.NOTHING, Fault.SILENCE])
def test_reading_is_repeated_after_a_passing_fault(client: VastClient, api: FakeApi, fault: Fault) -> None:
    client.create_instance(client.search_offers({}).offers[0].id, request())
    api.faults.extend([fault])
    assert len(client.instances(deadline_s=60)) == 1


@pytest.mark.parametrize(
    "fault", [Fault.TOO_FREQUENT, Fault.SERVER_ERROR, Fault.GARBAGE, Fault.NOTHING, Fault.SILENCE, Fault.NO_CONNECTION]
)
def test_an_outage_is_not_an_empty_list_and_ends_at_the_deadline(
    client: VastClient, api: FakeApi, clock: VirtualClock, fault: Fault
) -> None:
    api.outage = fault
    start = clock.time()
    with pytest.raises(VastUnavailableError, match="instances"):
        client.instances(deadline_s=60)
    assert clock.time() - start <= 60 + 20, "one request may still be under way at the deadline"


def test_a_list_without_its_rows_is_not_an_empty_list(client: VastClient, api: FakeApi, monkeypatch) -> None:
    monkeypatch.setattr(api.vast, "row", lambda instance: {"id": "not a number"})
    client.create_instance(client.search_offers({}).offers[0].id, request())
    with pytest.raises(VastUnavailableError, match="cannot be read"):
        client.instances()


def test_a_used_up_quota_is_final(client: VastClient, api: FakeApi) -> None:
    api.outage = Fault.QUOTA
    with pytest.raises(VastQuotaError, match="Daily search row quota") as used_up:
        client.search_offers({})
    assert len(api.requests) == 1
    assert used_up.value.until % 86400 == pytest.approx(0, abs=1), "until the end of the day in UTC"


def test_a_wrong_key_is_final_and_is_not_repeated_in_the_message(api: FakeApi, clock: VirtualClock) -> None:
    client = VastClient("https://vast.invalid", "secret-key", transport=FakeTransport(api), clock=clock)
    with pytest.raises(VastAuthError, match="Invalid user key") as refused:
        client.instances()
    assert "secret-key" not in str(refused.value)
    assert len(api.requests) == 1


def test_an_offer_that_is_gone_says_so_and_nothing_is_created(client: VastClient, api: FakeApi) -> None:
    offer = client.search_offers({}).offers[0]
    api.faults.extend([Fault.TAKEN])
    with pytest.raises(OfferTakenError):
        client.create_instance(offer.id, request())
    assert api.vast.billed() == []


def test_a_bid_that_is_too_low_names_the_contract_to_destroy(client: VastClient, api: FakeApi) -> None:
    offer = client.search_offers({"type": "bid"}).offers[0]
    with pytest.raises(CreateFailedError, match="below the minimum") as failed:
        client.create_instance(offer.id, request(price=0.01))
    assert [instance.id for instance in api.vast.billed()] == [failed.value.contract_id]
    [listed] = client.instances()
    assert listed.state is State.STOPPED
    client.destroy_instance(failed.value.contract_id)
    assert api.vast.billed() == []


@pytest.mark.parametrize("fault", [Fault.GARBAGE, Fault.NOTHING, Fault.LOST_ANSWER, Fault.SERVER_ERROR])
def test_a_creation_without_an_answer_is_uncertain_and_never_repeated(
    client: VastClient, api: FakeApi, fault: Fault
) -> None:
    offer = client.search_offers({}).offers[0]
    api.faults.extend([fault])
    with pytest.raises(CreateUncertainError):
        client.create_instance(offer.id, request())
    assert sum("/asks/" in path for _, path in api.requests) == 1


@pytest.mark.parametrize("fault", [Fault.TOO_FREQUENT, Fault.NO_CONNECTION])
def test_a_creation_that_did_nothing_is_repeated(client: VastClient, api: FakeApi, fault: Fault) -> None:
    offer = client.search_offers({}).offers[0]
    api.faults.extend([fault])
    contract = client.create_instance(offer.id, request())
    assert [instance.id for instance in api.vast.billed()] == [contract]


@pytest.mark.parametrize("fault", [None, Fault.LOST_ANSWER, Fault.SERVER_ERROR])
def test_destroying_twice_or_through_faults_ends_destroyed(
    client: VastClient, api: FakeApi, fault: Fault | None
) -> None:
    contract = client.create_instance(client.search_offers({}).offers[0].id, request())
    api.faults.append(fault)
    client.destroy_instance(contract, deadline_s=60)
    client.destroy_instance(contract)
    assert api.vast.billed() == []


def test_a_key_that_is_refused_with_a_404_does_not_pass_for_destroyed(api: FakeApi, clock: VirtualClock) -> None:
    """search_offers.yaml: 404, "Unauthorized - invalid or missing API key"."""
    refusal = Answer.refusal("auth_error", "Invalid user key", 404)
    api.handle = lambda *_: refusal  # type: ignore[method-assign]
    client = VastClient("https://vast.invalid", "secret-key", transport=FakeTransport(api), clock=clock)
    with pytest.raises(VastAuthError, match="Invalid user key"):
        client.destroy_instance(1)


@pytest.mark.parametrize("shape", range(3))
def test_an_offer_is_taken_in_all_the_words_for_it(client: VastClient, api: FakeApi, shape: int) -> None:
    api.handle = lambda *_: offer_gone(shape, 7)  # type: ignore[method-assign]
    with pytest.raises(OfferTakenError):
        client.create_instance(7, request())


@pytest.mark.parametrize("shape", range(3))
def test_an_instance_is_gone_in_all_the_words_for_it(client: VastClient, api: FakeApi, shape: int) -> None:
    api.handle = lambda *_: instance_gone(shape, 7)  # type: ignore[method-assign]
    client.destroy_instance(7)
    assert client.instance(7) is None


def test_no_credit_is_an_error_of_its_own(client: VastClient, api: FakeApi) -> None:
    offer = client.search_offers({}).offers[0]
    api.vast.credit = 0.0
    with pytest.raises(VastCreditError, match="add some"):
        client.create_instance(offer.id, request())
    assert api.vast.billed() == []


def test_the_credit_is_told_to_the_key_that_may_know_it(client: VastClient, api: FakeApi, clock: VirtualClock) -> None:
    api.vast.credit = 12.5
    assert client.credit() == pytest.approx(12.5)
    head = VastClient("https://vast.invalid", HEAD_KEY, transport=FakeTransport(api), clock=clock)
    assert head.credit() is None and head.instances() == []


@pytest.mark.parametrize("odd", ODD_ROWS)
def test_an_odd_row_of_somebody_else_hides_nothing(client: VastClient, api: FakeApi, odd: dict) -> None:
    theirs, ours = (client.create_instance(offer.id, request()) for offer in client.search_offers({}).offers[:2])
    api.vast.instances[theirs].odd = odd
    assert [instance.id for instance in client.instances()] == [theirs, ours]
    api.vast.instances[theirs].odd = {"id": "no number"}
    assert [instance.id for instance in client.instances()] == [ours]


def test_a_damaged_row_of_ours_says_what_it_can(client: VastClient, api: FakeApi) -> None:
    contract = client.create_instance(client.search_offers({}).offers[0].id, request())
    api.vast.instances[contract].odd = {"dph_total": "n/a", "num_gpus": "several", "machine_id": None}
    [instance] = client.instances()
    assert (instance.id, instance.label, instance.machine_id) == (contract, "bruno-ray:test:w1", 0)
    assert instance.unreadable == ("dph_total", "num_gpus") and instance.extra_env == {"A": "1"}


def test_offers_without_what_they_should_say_are_read_all_the_same(client: VastClient, api: FakeApi) -> None:
    api.odd_offers = [{"id": 5, "machine_id": None, "num_gpus": None, "gpu_name": None}, {"id": None}]
    page = client.search_offers({})
    assert page.offers[0].id == 5 and page.offers[0].num_gpus == 0
    assert len(page.offers) == 61 and not page.cut


def test_a_search_brings_64_and_says_that_there_are_more(client: VastClient, api: FakeApi) -> None:
    api.vast.add_offers(40)
    page = client.search_offers({"limit": 1000})
    assert len(page.offers) == 64 and page.cut


@pytest.mark.parametrize("fault", [Fault.TOO_FREQUENT, Fault.REFUSED_TOO_OFTEN])
def test_a_creation_that_came_too_early_waits_out_the_penalty(
    client: VastClient, api: FakeApi, clock: VirtualClock, fault: Fault
) -> None:
    offer = client.search_offers({}).offers[0]
    api.faults.append(fault)
    start = clock.time()
    client.create_instance(offer.id, request())
    assert clock.time() - start >= 12
    assert api.rates.passed == []


def test_what_the_api_says_in_detail_is_read(client: VastClient, api: FakeApi) -> None:
    api.handle = lambda *_: too_frequent(1, 4.5, 12.0)  # type: ignore[method-assign]
    with pytest.raises(VastUnavailableError, match=r"frequent endpoint threshold=4\.5"):
        client.instances()


def test_processes_of_a_machine_keep_to_the_limits_together(api: FakeApi, clock: VirtualClock, tmp_path: Path) -> None:
    """Everything that is asked in a busy minute, by two processes in turn."""
    clients = [
        VastClient(
            "https://vast.invalid", API_KEY, transport=FakeTransport(api), clock=clock, pace=Pace(clock, tmp_path)
        )
        for _ in range(2)
    ]
    for client in clients * 4:
        free = next(offer for offer in client.search_offers({}).offers if not offer.rented)
        contract = client.create_instance(free.id, request())
        client.set_label(contract, "bruno-ray:test:w1:up-to-date")
        client.change_bid(contract, 0.3)
        assert client.instance(contract) is not None and client.instances()
    for client, contract in zip(clients * 4, list(api.vast.instances), strict=True):
        client.destroy_instance(contract)
    assert api.rates.passed == [] and api.vast.billed() == []
    assert len(api.requests) == 8 * 7


def test_without_a_common_pace_the_imitation_refuses(api: FakeApi, clock: VirtualClock) -> None:
    """That the imitation's limits are there to be kept."""
    for _ in range(2):
        VastClient("https://vast.invalid", API_KEY, transport=FakeTransport(api), clock=clock).instances()
    assert [route for _, _, route in api.rates.passed] == ["GET /api/v1/instances"]


def test_a_turn_after_the_deadline_is_not_waited_for(client: VastClient, api: FakeApi, clock: VirtualClock) -> None:
    for _ in range(10):
        client.search_offers({})
    start = clock.time()
    with pytest.raises(VastUnavailableError, match="no turn"):
        client.search_offers({}, deadline_s=10)
    assert clock.time() == start and len(api.requests) == 10


def test_labels_bids_and_keys_reach_the_instance(client: VastClient, api: FakeApi) -> None:
    contract = client.create_instance(client.search_offers({"type": "bid"}).offers[0].id, request(price=0.2))
    client.set_label(contract, "bruno-ray:test:w1:up-to-date")
    client.change_bid(contract, 0.3)
    client.attach_ssh_key(contract, "ssh-ed25519 AAAA test")
    [instance] = api.vast.billed()
    assert (instance.label, instance.bid, instance.ssh_keys) == (
        "bruno-ray:test:w1:up-to-date",
        0.3,
        ["ssh-ed25519 AAAA test"],
    )
    with pytest.raises(VastRefusedError) as refused:
        client.set_label(contract + 1, "x")
    assert refused.value.means_gone


@pytest.mark.parametrize(
    ("actual", "intended", "state"),
    [
        (None, "running", State.BOOTING),
        ("created", "running", State.BOOTING),
        ("loading", "running", State.BOOTING),
        ("running", "running", State.RUNNING),
        ("offline", "running", State.UNREACHABLE),
        ("unknown", "running", State.UNREACHABLE),
        ("stopped", "running", State.STOPPED),
        ("exited", "running", State.STOPPED),
        ("running", "stopped", State.STOPPED),
    ],
)
def test_states(actual: str | None, intended: str, state: State) -> None:
    instance = Instance.model_validate({"id": 1, "actual_status": actual, "intended_status": intended, "ports": None})
    assert instance.state is state


def test_the_client_speaks_to_a_real_server() -> None:
    vast = FakeVast(boot_s=0.0)
    vast.add_offers(1)
    with FakeServer(FakeApi(vast)) as server, VastClient(server.url, API_KEY) as client:
        contract = client.create_instance(client.search_offers({}).offers[0].id, request())
        assert [instance.id for instance in client.instances()] == [contract]
        client.destroy_instance(contract)
        assert client.instances() == []


def test_a_silent_server_is_given_up_on() -> None:
    api = FakeApi(FakeVast())
    api.outage = Fault.NO_CONNECTION
    with FakeServer(api) as server, VastClient(server.url, API_KEY) as client, pytest.raises(VastUnavailableError):
        client.instances(deadline_s=1.0)

"""Renting one machine: search, judge, stay within the budget, create, and leave nothing behind that was not wanted."""

import logging
import uuid
from dataclasses import dataclass

from ray.autoscaler.tags import NODE_KIND_HEAD

from cluster.clock import Clock
from cluster.errors import NodeError, NoOfferError
from cluster.renting.budget import is_worth_while, nearly_spent, over_budget, price_room
from cluster.renting.cost import ClusterCost
from cluster.renting.ledger import Ledger
from cluster.renting.listing import NodeList
from cluster.renting.tags import ClusterNode, Label, creation_env, node_of
from cluster.settings import BudgetSettings, NodeSettings
from cluster.vast.client import VastClient
from cluster.vast.errors import CreateFailedError, CreateUncertainError, OfferTakenError, VastError
from cluster.vast.models import CreateRequest, Instance
from cluster.vast.offers import RankedOffer, Wanted, find_offers
from cluster.vast.onstart import Switch, onstart

logger = logging.getLogger(__name__)

OFFERS_TRIED = 6
"""Offers are taken by others between search and creation; after so many the market is too busy to go on."""

MARKET_S = 45.0
"""How long the offers that one search found are rented from."""

SETTLE_S = 15.0
"""How long a creation without an answer is looked for in the list, before it is given up as an unconfirmed launch."""

SETTLE_PAUSE_S = 3.0
PENDING_LAUNCH_S = 180.0
"""How long a creation counts for the budget that the list does not show; longer than the list is ever behind."""

CREATE_DEADLINE_S = 30.0
"""Room for a turn of five seconds, and for one penalty of twelve."""

ATTACH_DEADLINE_S = 8.0


@dataclass(frozen=True)
class LaunchOrder:
    """What to rent, and who it will be."""

    node: NodeSettings
    label: Label
    tags: dict[str, str]
    public_key: str
    url: str
    """Of the API, where a worker ends itself."""
    patience_s: float
    """How long a worker does without its head."""
    end: float | None
    """When the cluster's time is over, Unix seconds."""


@dataclass
class _Market:
    """What a search found, without what was tried since."""

    found_at: float
    offers: list[RankedOffer]


class Launcher:
    """Rents machines one after the other; the caller holds a lock so that two launches do not share a budget.

    Machines of a kind that are rented within `MARKET_S` share one search.
    """

    def __init__(
        self, client: VastClient, nodes: NodeList, ledger: Ledger, clock: Clock, budget: BudgetSettings
    ) -> None:
        self._client = client
        self._nodes = nodes
        self._ledger = ledger
        self._clock = clock
        self._budget = budget
        self._markets: dict[str, _Market] = {}

    def launch(self, order: LaunchOrder, cost: ClusterCost) -> ClusterNode:
        """Rent the best machine that the budget allows; it is in the node list when this returns.

        Raises `NoOfferError`, `BudgetError`, `NodeError` or `VastError`. Whatever was created on the way there is
        destroyed, or marked for it.
        """
        reserved = self._reserved()
        room = price_room(self._budget, cost, reserved)
        market = self._market(order.node)
        affordable = [ranked for ranked in market.offers if ranked.price_per_hour <= room]
        if affordable:
            affordable = [ranked for ranked in affordable if is_worth_while(self._budget, cost, ranked)]
            if not affordable:
                raise nearly_spent(self._budget, cost)
        if not affordable:
            cheapest = min(ranked.price_per_hour for ranked in market.offers)
            raise over_budget(self._budget, cost, reserved, cheapest)
        for ranked in affordable[:OFFERS_TRIED]:
            market.offers.remove(ranked)
            try:
                return self._rent(ranked, order, cost)
            except OfferTakenError as error:
                logger.info("offer %d is gone: %s", ranked.offer.id, error)
        self._markets.clear()
        raise NoOfferError("the best offers were taken by others; Ray tries again")

    def room(self, cost: ClusterCost) -> float:
        """Dollars per hour that the budget leaves for another machine; below 0 where it is passed."""
        return self._budget.max_price_per_hour - cost.per_hour - self._reserved()

    def _market(self, node: NodeSettings) -> _Market:
        """Offers that will do, of which there is at least one. Raises `NoOfferError` or `VastError`."""
        kind, now, avoided = node.model_dump_json(), self._clock.time(), self._ledger.avoided()
        market = self._markets.get(kind)
        if market is not None and now < market.found_at + MARKET_S:
            market.offers = [ranked for ranked in market.offers if ranked.offer.machine_id not in avoided]
            if market.offers:
                return market
        market = _Market(now, list(find_offers(self._client, Wanted.of(node), avoided).best()))
        self._markets[kind] = market
        return market

    def _reserved(self) -> float:
        """Dollars per hour of what may exist beside the known nodes."""
        known = [node.launch for node in self._nodes.nodes().values()]
        return self._ledger.pending_price(known) + self._nodes.unconfirmed_price()

    def _rent(self, ranked: RankedOffer, order: LaunchOrder, cost: ClusterCost) -> ClusterNode:
        launch = uuid.uuid4().hex[:12]
        request = CreateRequest(
            image=order.node.image,
            disk=Wanted.of(order.node).disk_gb,
            label=order.label.text(with_hashes=False),
            env=creation_env(order.label, order.tags, launch, ranked.traffic_cost),
            onstart=onstart(order.public_key, order.node.onstart, self._switch(ranked, order, cost)),
            price=ranked.bid,
        )
        self._ledger.add_pending_launch(launch, ranked.price_per_hour, order.label.index, PENDING_LAUNCH_S)
        try:
            contract = self._client.create_instance(ranked.offer.id, request, CREATE_DEADLINE_S)
        except CreateFailedError as error:
            if self._nodes.mark_for_destruction(str(error.contract_id), ranked.price_per_hour):
                self._ledger.drop_pending_launch(launch)
                raise OfferTakenError(str(error)) from error
            # Another attempt now could leave a second contract behind.
            raise NodeError(f"contract {error.contract_id} failed ({error}) and cannot be destroyed yet") from error
        except CreateUncertainError as error:
            found = self._find(launch)
            if found is None:
                self._nodes.unconfirmed_launch(launch)
                raise NodeError(f"{error}; if a machine was rented it will be destroyed when it is listed") from error
            return found
        except VastError:
            self._ledger.drop_pending_launch(launch)
            raise
        node = self._add_to_list(contract, ranked, request, order)
        self._attach_key(contract, order.public_key)
        logger.info(
            "rented instance %d for node %d: %d x %s at %.3f dollars per hour in %s",
            contract,
            order.label.index,
            ranked.offer.num_gpus,
            ranked.offer.gpu_name or "no GPU",
            ranked.price_per_hour,
            ranked.offer.geolocation or "an unknown place",
        )
        return node

    def _switch(self, ranked: RankedOffer, order: LaunchOrder, cost: ClusterCost) -> Switch | None:
        """Every worker ends itself without a head, and at the latest when it alone has spent what is left."""
        if order.label.kind == NODE_KIND_HEAD:
            return None
        left = self._budget.max_total_cost - cost.so_far
        ends = [self._clock.time() + 3600 * left / max(ranked.price_per_hour, 0.001)]
        if order.end is not None:
            ends.append(order.end)
        return Switch(order.url, order.patience_s, min(ends))

    def _add_to_list(
        self, contract: int, ranked: RankedOffer, request: CreateRequest, order: LaunchOrder
    ) -> ClusterNode:
        instance = Instance(
            id=contract,
            machine_id=ranked.offer.machine_id,
            label=request.label,
            extra_env=request.env,
            dph_total=ranked.price_per_hour,
            start_date=self._clock.time(),
            gpu_name=ranked.offer.gpu_name,
            num_gpus=ranked.offer.num_gpus,
        )
        node = node_of(instance, order.label.cluster)
        assert node is not None, "a label of ours is read back"
        self._nodes.created(node)
        return node

    def _attach_key(self, contract: int, key: str) -> None:
        """`onstart` lets the key in as well, so that a machine is not lost over a failure here."""
        try:
            self._client.attach_ssh_key(contract, key, ATTACH_DEADLINE_S)
        except VastError as error:
            logger.warning("the ssh key could not be attached to instance %d: %s", contract, error)

    def _find(self, launch: str) -> ClusterNode | None:
        """The node of a creation whose answer was lost, if the list shows it soon."""
        deadline = self._clock.time() + SETTLE_S
        while True:
            try:
                listed = self._nodes.nodes(force=True).values()
            except VastError as error:
                logger.warning("whether the creation happened could not be asked: %s", error)
                listed = []
            for node in listed:
                if node.launch == launch:
                    return node
            if self._clock.time() + SETTLE_PAUSE_S > deadline:
                return None
            self._clock.sleep(SETTLE_PAUSE_S)

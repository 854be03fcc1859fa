"""The peer of our secure sum: Flower's own SecAgg+, its real server workflow and its real client mod, in this process.

Both sides are Flower's code as it is; what is ours is the transport between them, which is not timed. Messages are
serialised both ways as on a wire, so that neither side sees the other's objects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod

# The peer is measured through its internals, which this benchmark alone may import.
from flwr.common import (  # noqa: TID251 (the peer)
    Code,
    FitRes,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage  # noqa: TID251 (the peer)
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_manager import SimpleClientManager  # noqa: TID251 (the peer)
from flwr.server.client_proxy import ClientProxy  # noqa: TID251 (the peer)
from flwr.server.compat.grid_client_proxy import GridClientProxy  # noqa: TID251 (the peer)
from flwr.server.compat.legacy_context import LegacyContext  # noqa: TID251 (the peer)
from flwr.server.strategy import FedAvg  # noqa: TID251 (the peer)
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD  # noqa: TID251 (the peer)
from flwr.server.workflow.constant import Key as WorkflowKey  # noqa: TID251 (the peer)
from flwr.server.workflow.secure_aggregation import secaggplus_workflow as peer  # noqa: TID251 (the peer)
from flwr.serverapp import Grid

from propolis.flower import (
    SERVER_NODE_ID,
    Run,
    make_run,
    message_from_bytes,
    message_to_bytes,
    quiet_flower,
    set_identity,
)
from propolis.secure.errors import PropolisError, UsageError

_RUN_ID = 1
# Node ids of 64 bits, as Flower's SuperLink gives them out: they are part of what a client uploads.
_FIRST_NODE_ID = 1 << 63
_QUANTIZATION_RANGE = 1 << 16
# Flower puts its clients on a ring at random, and halts if the drop-outs leave anyone too few neighbours: at 10 of 50
# dropped and 21 shares, on half of all rings. Such a ring is drawn anew, and its setup is not counted.
_MAX_RINGS = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """What one secure sum cost.

    Attributes:
        server_seconds: all of the server's protocol work; the clients' and the transport are not in it.
        client_seconds: mean over the surviving clients of all their stages, from float32 updates.
        upload_bytes: mean over the surviving clients of their serialised replies of all stages.
        largest_error: largest absolute difference from the plain mean of the surviving updates.
    """

    server_seconds: float
    client_seconds: float
    upload_bytes: float
    largest_error: float


def flower_secagg_cost(updates: Sequence[np.ndarray], dropped: int, shares: int | None = None) -> Cost:
    """Average the updates with Flower's SecAgg+ and say what it cost.

    Args:
        updates: one float32 vector of (d,) per client, within Flower's default clipping range of ±8; all weigh 1.
        dropped: so many clients, the last ones, fall silent after they shared their keys.
        shares: neighbours that a client shares its keys with, itself included; None means all (SecAgg). Flower wants
            an odd number below the number of clients.

    Raises:
        UsageError: the protocol cannot end with these numbers.
        PropolisError: it did not end.
    """
    quiet_flower()
    set_identity(_RUN_ID)
    survivors = len(updates) - dropped
    workflow = _workflow(len(updates), survivors, shares)
    for _ in range(_MAX_RINGS):
        clients = {_FIRST_NODE_ID + index: _Client(_FIRST_NODE_ID + index, u) for index, u in enumerate(updates)}
        server = _Server(workflow, _Clients(clients, set(list(clients)[:survivors])))
        server.advance(workflow.setup_stage)
        if server.survives:
            break
    else:
        raise PropolisError(f"none of {_MAX_RINGS} rings of {shares} survives {dropped} of {len(updates)} clients")
    for stage in (workflow.share_keys_stage, workflow.collect_masked_vectors_stage, workflow.unmask_stage):
        server.advance(stage)
    alive = list(clients.values())[:survivors]
    expected = np.mean(updates[:survivors], axis=0, dtype=np.float64)
    return Cost(
        server_seconds=server.seconds,
        client_seconds=sum(client.seconds for client in alive) / survivors,
        upload_bytes=sum(client.upload_bytes for client in alive) / survivors,
        largest_error=float(np.abs(server.mean() - expected).max()),
    )


def _workflow(clients: int, survivors: int, shares: int | None) -> peer.SecAggPlusWorkflow:
    # Flower tells the clients an even number, then takes one neighbour more, for whom they have no share.
    if shares is not None and (shares % 2 == 0 or shares >= clients):
        raise UsageError(f"shares is {shares}: it must be odd and below the number of clients, {clients}")
    num_shares = clients if shares is None else shares
    # A threshold must be below the number of shares, which matters to 3 shares alone.
    threshold = min(2 * num_shares // 3 + 1, num_shares - 1)
    if survivors < threshold:
        raise UsageError(f"{survivors} of {clients} clients survive; the threshold is {threshold}")
    return peer.SecAggPlusWorkflow(num_shares, threshold, max_weight=1.0, quantization_range=_QUANTIZATION_RANGE)


class _Client:
    """One client: Flower's mod around an app that has trained already."""

    def __init__(self, node_id: int, update: np.ndarray) -> None:
        self.seconds = 0.0
        self.upload_bytes = 0
        self._update = update
        self._context = Context(_RUN_ID, node_id, {}, RecordDict(), {})

    def answer(self, message: Message) -> Message:
        result = self._result() if _stage(message) == Stage.COLLECT_MASKED_VECTORS else RecordDict()
        began = time.perf_counter()
        reply = secaggplus_mod(message, self._context, lambda request, _: Message(result, reply_to=request))
        self.seconds += time.perf_counter() - began
        on_wire = message_to_bytes(reply)
        self.upload_bytes += len(on_wire)
        return message_from_bytes(on_wire)

    def _result(self) -> RecordDict:
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self._update]), num_examples=1, metrics={})
        return compat.fitres_to_recorddict(result, keep_input=False)


class _Clients(Grid):
    """The transport: every client answers at once, the dropped ones only until keys are shared."""

    def __init__(self, clients: dict[int, _Client], survivors: set[int]) -> None:
        self.survivors = survivors
        self.seconds = 0.0
        self._clients = clients

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        began = time.perf_counter()
        replies = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id in self.survivors or _stage(message) in (Stage.SETUP, Stage.SHARE_KEYS):
                replies.append(self._clients[node_id].answer(message_from_bytes(message_to_bytes(message))))
        self.seconds += time.perf_counter() - began
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return list(self._clients)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return make_run(_RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


class _Strategy(FedAvg):
    """Asks all clients and keeps the mean; FedAvg would average n copies of it again, which is no part of the sum."""

    mean: Parameters

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        self.mean = results[0][1].parameters
        return None, {}


class _Server:
    """One run of Flower's workflow, stage by stage."""

    def __init__(self, workflow: peer.SecAggPlusWorkflow, grid: _Clients) -> None:
        self._threshold = workflow.reconstruction_threshold
        self._grid = grid
        node_ids = list(grid.get_node_ids())
        self._strategy = _Strategy(min_fit_clients=len(node_ids), min_available_clients=len(node_ids))
        self._context = self._legacy_context(node_ids)
        self._state = peer.WorkflowState()
        self._wall_seconds = 0.0

    def _legacy_context(self, node_ids: Sequence[int]) -> LegacyContext:
        state = RecordDict()
        state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
        # No model goes out: sending one costs the same without SecAgg+.
        state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(ndarrays_to_parameters([]), True)
        manager = SimpleClientManager()
        for node_id in node_ids:
            manager.register(GridClientProxy(node_id, self._grid, _RUN_ID))
        context = Context(_RUN_ID, SERVER_NODE_ID, {}, state, {})
        return LegacyContext(context, strategy=self._strategy, client_manager=manager)

    @property
    def seconds(self) -> float:
        """The server's own time so far."""
        return self._wall_seconds - self._grid.seconds

    @property
    def survives(self) -> bool:
        """Whether every client's neighbourhood keeps enough survivors; known once the setup stage drew them."""
        neighbourhoods = self._state.nid_to_neighbours.values()
        return all(len(nodes & self._grid.survivors) >= self._threshold for nodes in neighbourhoods)

    def advance(self, stage: Callable[[Grid, LegacyContext, peer.WorkflowState], bool]) -> None:
        began = time.perf_counter()
        went_well = stage(self._grid, self._context, self._state)
        self._wall_seconds += time.perf_counter() - began
        if not went_well:
            raise PropolisError(f"Flower halted SecAgg+ in {stage.__name__}")

    def mean(self) -> np.ndarray:
        """What the workflow handed its strategy."""
        return parameters_to_ndarrays(self._strategy.mean)[0]


def _stage(message: Message) -> object:
    return message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]

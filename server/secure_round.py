"""One attempt at one secure round: the mirror of `propolis.client.update`.

hello    who is there, with which prekey
prepare  mask keys and sealed shares
upload   the devices train; each masked vector is folded into one sum as it comes
confirm  who is alive, against a lying server only
unmask   the shares that take the sum's masks away
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from propolis.secure.errors import PeerError, Refusal, RefusedError, TooFewPeersError
from propolis.secure.identity import Signed
from propolis.secure.secagg.messages import (
    ConfirmReply,
    HelloReply,
    HelloRequest,
    PrepareReply,
    UnmaskReply,
    UploadReply,
    from_bytes,
    to_bytes,
)
from propolis.secure.secagg.server import SecAggServer
from propolis.secure.secagg.states import Exchange
from propolis.server.channel import Channel, Content
from propolis.server.directory import Directory

# Nobody is asked again with less time left: a SuperLink refuses messages that have expired when they reach it.
_SHORTEST_S = 1.0

_log = logging.getLogger("flwr")


class ModelSource(Protocol):
    """What devices are told to train on, and what they have of it."""

    def content_for(self, index: int) -> Content:
        """What is sent to a device."""

    def acknowledge(self, index: int) -> None:
        """A device has what it was sent."""

    def forget(self, index: int) -> None:
        """A device has nothing that could be built on."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that an exchange may take.

    Attributes:
        handshake: one without training.
        training: the upload.
    """

    handshake: float
    training: float


def say_hello(channel: Channel, directory: Directory, roster: Signed, node_ids: Iterable[int], timeout: float) -> None:
    """Learn who the nodes are that nobody knows yet; `directory` then knows those that answered well."""
    challenge = os.urandom(32)
    request = to_bytes(HelloRequest(roster, challenge))
    asked = dict.fromkeys(directory.strangers(node_ids), request)
    for node_id, body in channel.ask(Exchange.HELLO, asked, timeout):
        _accept(channel, Exchange.HELLO, node_id, partial(_take_hello, directory, node_id, challenge, body))


class SecureRound:
    """See the module.

    Args:
        channel: to the devices.
        directory: of them.
        server: the protocol's role in this round.
        nodes: node ids of the cohort, by index.
        min_clients: fewest devices that a sum may be over.
    """

    def __init__(
        self, channel: Channel, directory: Directory, server: SecAggServer[Any], nodes: dict[int, int], min_clients: int
    ) -> None:
        self._channel, self._directory, self._server, self._nodes = channel, directory, server, nodes
        self._index = {node_id: index for index, node_id in nodes.items()}
        self._min_clients = min_clients

    def collect(self, source: ModelSource, deadlines: Deadlines, require_publishable: Callable[[], None]) -> None:
        """All the exchanges, up to the shares that the sum needs.

        Args:
            source: what devices are told to train on.
            deadlines: of the exchanges.
            require_publishable: raises once it is known over which devices the sum is, where it must not be told.

        Raises:
            TooFewPeersError: too few devices are left.
        """
        self.prepare(deadlines.handshake)
        self.upload(source, deadlines.training)
        require_publishable()
        if self._server.terms.plan.malicious:
            self.confirm(deadlines.handshake)
        self.unmask(deadlines.handshake)

    def prepare(self, timeout: float) -> None:
        """Gather mask keys and sealed shares; whoever has forgotten its peers is told of them and asked once more."""
        deadline = time.monotonic() + timeout
        not_told = {index for index in self._server.terms.cohort if self._is_told_of_some(index)}
        self._ask_to_prepare(self._server.terms.cohort, timeout)
        unknowing = [i for i, node in self._nodes.items() if self._channel.refusals.get(node) is Refusal.UNKNOWN_PEER]
        forgetful = [index for index in unknowing if index in not_told]  # who was sent everything is lying
        for index in forgetful:
            self._directory.forget_told(index)
        self._ask_again(forgetful, deadline, self._ask_to_prepare)
        self._require(len(self._server.ready), "prepared")

    def _is_told_of_some(self, index: int) -> bool:
        """Whether a device is believed to know some neighbour, whose descriptor it is then not sent."""
        return bool(self._directory.told_of(index, self._server.terms.neighbours(index)))

    def _ask_to_prepare(self, indices: Iterable[int], timeout: float) -> None:
        server, directory = self._server, self._directory

        def request(index: int) -> bytes:
            told_of = directory.told_of(index, server.terms.neighbours(index))
            return to_bytes(server.prepare_request(index, told_of))

        def take(index: int, body: bytes) -> None:
            reply = from_bytes(PrepareReply, body)
            directory.note_told(index, server.terms.neighbours(index))
            directory.take_next(self._nodes[index], server.keys_of(index), reply.next_prekey)
            server.receive_prepare(index, reply)

        self._exchange(Exchange.PREPARE, indices, request, take, timeout)

    def upload(self, source: ModelSource, timeout: float) -> None:
        """Have the devices train on what `source` has for them, and fold what they send.

        A device that cannot rebuild the model from what it has is sent the whole one, in the same exchange.
        """
        deadline = time.monotonic() + timeout
        self._upload(self._server.ready, source, timeout)
        stranded = [i for i in self._server.ready if self._channel.refusals.get(self._nodes[i]) is Refusal.BASE]
        if stranded:
            _log.warning("secure round: %d devices could not rebuild the model: they are sent the whole", len(stranded))
        for index in stranded:
            source.forget(index)
        self._ask_again(stranded, deadline, lambda indices, left: self._upload(indices, source, left))
        self._require(len(self._server.alive), "sent a masked update")
        self._server.close_uploads()

    def _upload(self, indices: Iterable[int], source: ModelSource, timeout: float) -> None:
        server = self._server

        def take(index: int, body: bytes) -> None:
            source.acknowledge(index)  # it has answered, so it has rebuilt the model
            server.receive_upload(index, from_bytes(UploadReply, body, server.largest_upload))

        self._exchange(
            Exchange.UPLOAD,
            indices,
            lambda i: to_bytes(server.upload_request(i)),
            take,
            timeout,
            lambda node_id: source.content_for(self._index[node_id]),
        )

    def _ask_again(self, indices: list[int], deadline: float, ask: Callable[[list[int], float], None]) -> None:
        """Ask some devices once more in the time that is left; where there is none, they have failed."""
        left = deadline - time.monotonic()
        if indices and left >= _SHORTEST_S:
            for index in indices:
                self._channel.forgive(self._nodes[index])
            ask(indices, left)

    def confirm(self, timeout: float) -> None:
        """Gather signatures on who is alive."""
        server = self._server
        request = to_bytes(server.confirm_request())

        def take(index: int, body: bytes) -> None:
            server.receive_confirm(index, from_bytes(ConfirmReply, body))

        self._exchange(Exchange.CONFIRM, server.alive, lambda _: request, take, timeout)

    def unmask(self, timeout: float) -> None:
        """Gather the shares."""

        def take(index: int, body: bytes) -> None:
            self._server.receive_unmask(index, from_bytes(UnmaskReply, body))

        server = self._server
        self._exchange(Exchange.UNMASK, server.alive, lambda i: to_bytes(server.unmask_request(i)), take, timeout)

    def _exchange(
        self,
        asked: Exchange,
        indices: Iterable[int],
        request_of: Callable[[int], bytes],
        take: Callable[[int, bytes], None],
        timeout: float,
        content_of: Callable[[int], Content] | None = None,
    ) -> None:
        bodies = {self._nodes[index]: request_of(index) for index in indices}
        for node_id, body in self._channel.ask(asked, bodies, timeout, content_of):
            _accept(self._channel, asked, node_id, partial(take, self._index[node_id], body))

    def _require(self, count: int, did: str) -> None:
        if count < self._min_clients:
            raise TooFewPeersError(
                f"{count} of {len(self._nodes)} devices {did}, {self._min_clients} are needed{self._channel.said}"
            )


@contextmanager
def telling_a_sum(directory: Directory, channel: Channel) -> Iterator[None]:
    """While a sum is made of what devices sent: who is known to have made it impossible takes part no more.

    Raises:
        TooFewPeersError: it cannot be made.
    """
    try:
        yield
    except PeerError as error:
        if error.culprit is not None:
            directory.ban(error.culprit)
        raise TooFewPeersError(f"the sum cannot be told: {error}") from None
    except TooFewPeersError as error:
        raise TooFewPeersError(f"{error}{channel.said}") from None


def _take_hello(directory: Directory, node_id: int, challenge: bytes, body: bytes) -> None:
    directory.take_hello(node_id, challenge, from_bytes(HelloReply, body))


def _accept(channel: Channel, asked: Exchange, node_id: int, take: Callable[[], None]) -> None:
    """Take a reply; a device whose reply is refused is a drop-out."""
    try:
        take()
    except RefusedError as error:
        channel.failures[node_id] = f"{asked.label}: {error}"

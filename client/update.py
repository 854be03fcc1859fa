"""The device's end of the secure sum, as a Flower mod: train, encode, mask, upload.

Two lines make an existing Flower app secure: `SecureGrid` on the server, and ``ClientApp(mods=[secure_mod])`` here.
Nothing of the device leaves it outside of the protocol: a message that does not belong to it is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from propolis.client.encrypted import encrypt_under_masks, encrypt_update
from propolis.client.local_update import Asked, trained_update
from propolis.client.seal import Seal
from propolis.client.state import FOLDER_KEY, DeviceStore, FileStore, policy_of
from propolis.link.keys import passphrase_of
from propolis.messages import (
    RECORD,
    broadcast_in,
    fill_model,
    model_digest,
    model_in,
    open_record,
    protocol_record,
    refusal_code,
    shapes_of,
    shared_input_of,
    sizes_elsewhere,
    without_record,
)
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.series import Broadcast, Version, rebuild
from propolis.secure.codec.update import encode_update
from propolis.secure.errors import PropolisError, Refusal, RefusedError, TrustError
from propolis.secure.secagg.addition import RingVector
from propolis.secure.secagg.device import Device, Upload
from propolis.secure.secagg.plan import Terms
from propolis.secure.secagg.states import Exchange

StoreOf = Callable[[Context], DeviceStore]

_log = logging.getLogger("propolis.client")


def node_store(context: Context) -> DeviceStore:
    """The store of a Flower node: the folder ``propolis-dir`` of its own configuration, with the policy there.

    A state that is encrypted is opened with the passphrase in the environment, see `propolis.link.keys`.
    """
    folder = context.node_config.get(FOLDER_KEY)
    if not isinstance(folder, str) or not folder:
        raise TrustError(Refusal.NOT_ENROLLED, f"the node's configuration names no {FOLDER_KEY}")
    return FileStore(Path(folder), policy_of(context.node_config), _seal_under(passphrase_of(None)))


@lru_cache(maxsize=1)
def _seal_under(passphrase: bytes | None) -> Seal | None:
    """The seal of this process: its key takes a moment to derive."""
    return None if passphrase is None else Seal(passphrase)


class SecureMod:
    """A Flower mod that answers the protocol's exchanges and lets the app train in the middle of one.

    It never raises: what is wrong becomes an error reply with the code of a `Refusal`, and a line in this device's
    own log. Only where the owner allows unprotected messages, what the app raises in one goes through.

    Args:
        store_of: finds the device's store for a Flower context.
    """

    def __init__(self, store_of: StoreOf = node_store) -> None:
        self._store_of = store_of

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """See `flwr.clientapp.typing.Mod`."""
        if message.has_content() and RECORD not in message.content and self._lets_through(context):
            return call_next(message, context)
        try:
            exchange, request = open_record(message.content)
            reply = _answer(self._store_of(context), exchange, request, message, context, call_next)
            return Message(RecordDict({RECORD: protocol_record(exchange, reply)}), reply_to=message)
        except RefusedError as error:
            _log.warning("refused a message: %s", error)
            refusal = error.refusal
        except PropolisError as error:
            _log.error("cannot take part: %s", error)
            refusal = Refusal.STORAGE
        except Exception:  # a bug of ours: the device stays silent about it, but is not lost
            _log.exception("cannot take part")
            refusal = Refusal.STORAGE
        return Message(Error(refusal_code(refusal), refusal.reason), reply_to=message)

    def _lets_through(self, context: Context) -> bool:
        """Whether the device's owner lets the server see this device's own values."""
        try:
            return self._store_of(context).policy.allow_unprotected
        except PropolisError:
            return False


_node_mod = SecureMod()


def secure_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """`SecureMod` for the devices of Flower's SuperNodes, see `node_store`: ``ClientApp(mods=[secure_mod])``."""
    return _node_mod(message, context, call_next)


def _answer(
    store: DeviceStore,
    exchange: Exchange,
    request: bytes,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> bytes:
    if exchange is Exchange.ENCRYPT:
        return encrypt_update(store, request, message, context, call_next)
    if exchange is Exchange.UPLOAD:
        return _upload(store, request, message, context, call_next)
    steps: dict[Exchange, Callable[[Device], bytes]] = {
        Exchange.HELLO: lambda device: device.hello(request),
        Exchange.PREPARE: lambda device: device.prepare(request),
        Exchange.CONFIRM: lambda device: device.confirm(request),
        Exchange.UNMASK: lambda device: device.unmask(request),
    }
    return store.change(steps[exchange])


def _upload(
    store: DeviceStore, request: bytes, message: Message, context: Context, call_next: ClientAppCallable
) -> bytes:
    """Train in the app, and mask what it gives; the store is free while the app trains."""
    terms = store.change(lambda device: device.terms)
    if terms.is_encrypted:
        return encrypt_under_masks(store, request, terms, message, context, call_next)
    content, version = _with_rebuilt_model(store, message.content)
    old = model_in(content)
    model = model_digest(old)
    shared_input = shared_input_of(content, model, message.metadata.group_id)

    def begin(device: Device) -> tuple[bytes | None, Terms, Pipeline, int, bytes]:
        terms = device.terms
        asked = Asked.of(terms)
        asked.require_type(message)
        asked.require_names(old, exactly=False)
        device.require_sums_allowed()  # it may have a key since it prepared
        device.require_reveals_left(model, terms.kind)
        pipeline = Pipeline(terms.encoding, len(terms.cohort), shapes_of(old), old)
        device.require_share(pipeline.support)
        place = terms.place(device.state.index)
        return (
            device.begin_upload(request, shared_input),
            terms,
            pipeline,
            place,
            device.rounding_seed(terms.kind, terms.plan.round),
        )

    stored, terms, pipeline, place, seed = store.change(begin)
    if stored is not None:
        return stored
    if version is not None:
        store.keep_model(version)
    message.content = content
    try:
        update = trained_update(message, context, call_next, old, Asked.of(terms), store.policy)
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        vector, lanes, metrics = encode_update(update, pipeline, place, rng)
    except Exception:  # whatever it is, that there is one says something of the data
        store.change(lambda device: device.count_reveal(model, terms.kind))
        raise
    upload = Upload(shared_input, model, RingVector(vector, terms.grid.ring), lanes, metrics)
    return store.change(lambda device: device.upload(request, upload))


def _with_rebuilt_model(store: DeviceStore, content: RecordDict) -> tuple[RecordDict, Version | None]:
    """What the application put into a message, with the model from what this device has and what came.

    Returns:
        The content; the version, to be kept once the message has been accepted, where it came as one.
    """
    way = broadcast_in(content)
    content = without_record(content)
    if not way:
        return content, None
    version = rebuild(Broadcast.from_bytes(way), store.recall_model(), sizes_elsewhere(content))
    return fill_model(content, version.values), version

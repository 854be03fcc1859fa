"""The device's end of a round under homomorphic encryption: open the model, train, encrypt, upload.

The tag of a model is checked before anything of it is decrypted, and every refusal of one has the same code. What
leaves the device is encrypted under the federation's key, and tagged for this attempt alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from propolis.client.encrypted_sums import HeldKeys, keys_of
from propolis.client.local_update import Asked, trained_update
from propolis.client.progress import told
from propolis.client.state import DeviceStore
from propolis.messages import (
    Arrays,
    broadcast_in,
    emptied_shapes,
    encrypted_input_of,
    fill_arrays,
    model_digest,
    model_in,
    without_record,
)
from propolis.secure.codec.lanes import LANES
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.he.held import Assignment, EncodedUpdate, forget_opened
from propolis.secure.he.layout import Opened, Sample
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum
from propolis.secure.he.tag import refused, require_set
from propolis.secure.secagg.device import Device, Upload, require_roster
from propolis.secure.secagg.plan import Kind, Plan, Terms


def encrypt_update(
    store: DeviceStore, request: bytes, message: Message, context: Context, call_next: ClientAppCallable
) -> bytes:
    """Answer the one exchange of a round without masks.

    Args:
        store: the device's.
        request: the plan.
        message: with the model, encrypted or, in a first round, as it is.
        context: for the app.
        call_next: the app.

    Raises:
        PeerError, TrustError: the request or the model is refused, or the app's answer is no update.
    """
    if store.policy.require_masks:
        raise PeerError(Refusal.POLICY, "this device asks for masks on what it encrypts")
    asked = _Asked.of(store, EncryptedPlan.from_bytes(request), message)
    key = asked.keys.newest.public
    if key.masked:
        raise PeerError(Refusal.POLICY, f"this device's key is for {key.use}")

    def begin(device: Device) -> bytes:
        plan = asked.plan
        require_roster(device.roster(), plan.roster_number, plan.roster_digest)
        device.require_trusted_key(plan.key_id)
        device.require_weight(plan.weight_key)
        name = (plan.round, plan.attempt)
        device.require_new(plan.run_id, name)
        # From here on this attempt is answered: two uploads for it would tell of the tags' key, and whether a model of
        # the server's choice opens, or what comes of it, is told once for each attempt.
        device.state.note_attempt(plan.run_id, name)
        return device.rounding_seed(plan.kind, plan.round)

    seed = store.change(begin)
    return _encoded_update(store, asked, _opened(store, asked), seed, context, call_next).masked(())


def encrypt_under_masks(
    store: DeviceStore, request: bytes, terms: Terms, message: Message, context: Context, call_next: ClientAppCallable
) -> bytes:
    """Answer the upload of a secure sum of encrypted updates.

    Args:
        store: the device's.
        request: of the upload.
        terms: of the round under way.
        message: as in `encrypt_update`.
        context: likewise.
        call_next: likewise.

    Raises:
        PeerError, TrustError: as `encrypt_update`, or it is not the time to upload.
    """
    plan = EncryptedPlan.from_bytes(terms.plan.encrypted)
    _require_same_attempt(plan, terms.plan)
    asked = _Asked.of(store, plan, message)

    def begin(device: Device) -> tuple[bytes | None, bytes]:
        if device.terms.bytes != terms.bytes:
            raise PeerError(Refusal.PHASE, "another round has begun")
        device.require_trusted_key(plan.key_id)
        device.require_weight(plan.weight_key)
        return device.begin_upload(request, asked.shared_input), device.rounding_seed(plan.kind, plan.round)

    stored, seed = store.change(begin)
    if stored is not None:
        return stored
    opened = _opened(store, asked)
    model = opened.digest
    store.change(lambda device: device.require_reveals_left(model, terms.kind))
    try:
        update = _encoded_update(store, asked, opened, seed, context, call_next)
    except Exception:  # whatever it is, that there is one says something of the data
        store.change(lambda device: device.count_reveal(model, terms.kind))
        raise
    upload = Upload(asked.shared_input, model, update, LANES.zeros(0), ())
    return store.change(lambda device: device.upload(request, upload))


@dataclass(frozen=True, slots=True, repr=False)
class _Asked:
    """What a device is asked to do, before it opens anything.

    Attributes:
        plan: of the attempt.
        keys: the device's; it encrypts under the newest.
        message: from the server.
        broadcast: the encrypted model; empty in a first round.
        shared_input: digest of the model and all else in the message.
    """

    plan: EncryptedPlan
    keys: HeldKeys
    message: Message
    broadcast: bytes
    shared_input: bytes

    @classmethod
    def of(cls, store: DeviceStore, plan: EncryptedPlan, message: Message) -> Self:
        """Look at a message; raises PeerError or TrustError where that is enough to refuse it."""
        keys = keys_of(store)
        keys.newest.require_plan(plan)
        broadcast = broadcast_in(message.content)
        _, shared_input = encrypted_input_of(without_record(message.content), broadcast, message.metadata.group_id)
        asked = cls(plan, keys, message, broadcast, shared_input)
        asked.update.require_type(message)
        return asked

    @property
    def update(self) -> Asked:
        """What is to come back."""
        return Asked(Kind(self.plan.kind), self.plan.weight_key, frozenset(entry.name for entry in self.plan.entries))


@dataclass(frozen=True, slots=True, repr=False)
class _Given:
    """What a device was given to work on.

    Attributes:
        content: for the app, with the model.
        model: its arrays.
        digest: of the model; of one that came encrypted, of just what was.
        made_under: id of the key that the model was encrypted under; empty of a public one.
    """

    content: RecordDict
    model: Arrays
    digest: bytes
    made_under: bytes


def _opened(store: DeviceStore, asked: _Asked) -> _Given:
    """What the application put into the message, with the model; raises PeerError or TrustError."""
    content, made_under = without_record(asked.message.content), b""
    if asked.broadcast:
        made_by, opened = _opened_broadcast(store, asked)
        content, made_under = _with_model(content, made_by, opened), made_by.key_id
    model = model_in(content)
    _require_arrays(asked.plan, model)
    return _Given(content, model, model_digest(opened.arrays if asked.broadcast else model), made_under)


def _opened_broadcast(store: DeviceStore, asked: _Asked) -> tuple[EncryptedPlan, Opened]:
    """The model that came encrypted; raises PeerError or TrustError.

    What only the key tells to be none is counted: who tries forgeries shall not go on for ever.
    """
    total, floor = EncryptedSum.from_bytes(asked.broadcast), store.policy.min_cohort
    if total.frozen:
        raise PeerError(Refusal.MALFORMED, "what training leaves alone does not come with the encrypted model")
    made_by = total.made_by()
    key = asked.keys.key(made_by.key_id)
    if made_by.kind != Kind.TRAIN:
        raise refused()
    require_set(total.devices, floor, key.public.parameters)
    store.change(lambda device: device.require_trusted_key(made_by.key_id))
    try:
        return asked.keys.open(total, floor)
    except PeerError:
        store.change(lambda device: device.state.count_refused_sum(made_by.key_id))
        raise


def _encoded_update(
    store: DeviceStore, asked: _Asked, given: _Given, seed: bytes, context: Context, call_next: ClientAppCallable
) -> EncodedUpdate:
    """Let the app train, or evaluate, and make integers of what it answers; raises PeerError."""
    expected, old, message = asked.update, given.model, asked.message
    if asked.broadcast:
        store.change(lambda device: device.take_training(given.digest, expected.kind))
    message.content = given.content
    update = trained_update(message, context, call_next, old, expected, store.policy)
    arrays = {name: old[name].astype(np.float64) + change for name, change in update.changes.items()}
    held = {name: array.astype(np.float64) for name, array in old.items() if name in expected.names}
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    assignment = Assignment(asked.plan, held, not asked.broadcast, asked.shared_input)
    encoded = asked.keys.newest.encoded(assignment, Sample(arrays, update.weight, update.metrics), rng)
    if expected.kind is Kind.TRAIN and given.made_under == asked.plan.key_id and asked.keys.kept > 1:
        # The federation has moved on to this key, with a model that can be trained: nothing before it comes any more.
        store.forget_he_keys_before(asked.keys.bundle)
        forget_opened()
    return replace(encoded, watched=partial(told, what="encrypting the update"))


def _require_same_attempt(plan: EncryptedPlan, around: Plan) -> None:
    """Refuse a plan that names another attempt than the secure sum that it is part of."""
    names = ("run_id", "round", "attempt", "kind", "roster_number", "roster_digest")
    if any(getattr(plan, name) != getattr(around, name) for name in names):
        raise PeerError(Refusal.MODEL, "the plan of what is encrypted is of another attempt than the secure sum")


def _with_model(content: RecordDict, made_by: EncryptedPlan, opened: Opened) -> RecordDict:
    """What the application put into a message, with the model that came encrypted."""
    if emptied_shapes(content) != {entry.name: entry.shape for entry in made_by.entries}:
        raise PeerError(Refusal.MODEL, "the encrypted model is not of the arrays that the message leaves out")
    return fill_arrays(content, opened.arrays)


def _require_arrays(plan: EncryptedPlan, model: Arrays) -> None:
    """Refuse a plan that calls for other arrays than the model has."""
    for entry in plan.entries:
        array = model.get(entry.name)
        if array is None or (str(array.dtype), array.shape) != (entry.dtype, entry.shape):
            raise PeerError(Refusal.MODEL, f"{entry.name} is not an array of {entry.dtype} and shape {entry.shape}")

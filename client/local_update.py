"""What the app on a device answers, taken for an update within the data holder's own limits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from propolis.messages import Arrays, model_in
from propolis.secure.codec.update import Update
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.secagg.plan import Kind, Terms
from propolis.secure.secagg.policy import Policy

_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a round asks a device for.

    Attributes:
        kind: to train, or to evaluate.
        weight_key: the metric that is the weight.
        names: of the arrays that are to come back.
    """

    kind: Kind
    weight_key: str
    names: frozenset[str]

    @classmethod
    def of(cls, terms: Terms) -> Self:
        """From the plan of a secure sum."""
        encoding = terms.encoding
        return cls(terms.kind, encoding.weight_key, frozenset((*encoding.quantized, *encoding.exact)))

    def require_type(self, message: Message) -> None:
        """Refuse a message of another type than the round is for; raises PeerError."""
        expected = self.kind.name.lower()
        if message.metadata.message_type != expected:
            kinds = f"{message.metadata.message_type} in a round to {expected}"
            raise PeerError(Refusal.MODEL, f"a message to {kinds}")

    def require_names(self, names: Collection[str], *, exactly: bool) -> None:
        """Refuse a model, or an update, without the arrays that are to come back; raises PeerError."""
        if not self.names <= set(names) or (exactly and set(names) != self.names):
            raise PeerError(Refusal.MODEL, "the names of the arrays are not those of the round's plan")


def trained_update(
    message: Message, context: Context, call_next: ClientAppCallable, old: Arrays, asked: Asked, policy: Policy
) -> Update:
    """Let the app train, or evaluate, and take what it answers for an update.

    Args:
        message: for the app.
        context: likewise.
        call_next: the app.
        old: the arrays in the message.
        asked: what the round asks for.
        policy: what the device insists on.

    Raises:
        PeerError: the app failed, or its answer is no update of these arrays.
    """
    return _within(_update_of(_answer(message, context, call_next), old, asked), policy)


def _answer(message: Message, context: Context, call_next: ClientAppCallable) -> RecordDict:
    """The app's answer."""
    try:
        reply = call_next(message, context)
    except (Exception, SystemExit) as error:  # the user's own code
        _log.debug("the app failed", exc_info=True)
        raise PeerError(Refusal.TRAINING_FAILED, f"the app failed: {type(error).__name__}: {error}") from None
    if not isinstance(reply, Message):
        raise PeerError(Refusal.TRAINING_FAILED, f"the app answered {type(reply).__name__}")
    if reply.has_error():
        raise PeerError(Refusal.TRAINING_FAILED, f"the app answered error {reply.error.code}: {reply.error.reason}")
    return reply.content


def _update_of(reply: RecordDict, old: Arrays, asked: Asked) -> Update:
    """What the app's reply says, as changes to the arrays that came."""
    if len(reply.metric_records) != 1:
        raise PeerError(Refusal.MODEL, f"expected one MetricRecord from the app, got {len(reply.metric_records)}")
    metrics = dict(next(iter(reply.metric_records.values())))
    weight = metrics.pop(asked.weight_key, None)
    if not isinstance(weight, (int, float)):
        raise PeerError(Refusal.WEIGHT, f"the app's metrics have no number {asked.weight_key}")
    scalars = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    if len(scalars) < len(metrics):
        raise PeerError(Refusal.MODEL, "only metrics that are single numbers can be added up")
    if asked.kind is Kind.EVALUATE:
        return Update({}, float(weight), scalars)
    new = model_in(reply)
    asked.require_names(new, exactly=True)
    return Update({name: _change(name, new[name], old[name]) for name in new}, float(weight), scalars)


def _within(update: Update, policy: Policy) -> Update:
    """The update within the data holder's own limits: its weight cut down, its change scaled down."""
    weight = update.weight if policy.max_weight is None else min(update.weight, policy.max_weight)
    changes: Mapping[str, NDArray[Any]] = update.changes
    if policy.max_norm is not None:
        norm = float(np.sqrt(sum(float(np.square(change, dtype=np.float64).sum()) for change in changes.values())))
        if norm > policy.max_norm:
            changes = {name: change * (policy.max_norm / norm) for name, change in changes.items()}
    return replace(update, weight=weight, changes=changes)


def _change(name: str, new: NDArray[Any], old: NDArray[Any]) -> NDArray[Any]:
    # Flower's adaptive strategies make the whole model float64, counters too; the app answers in its own types.
    if new.shape != old.shape or (new.dtype.kind != old.dtype.kind and old.dtype.kind != "f"):
        raise PeerError(
            Refusal.MODEL, f"{name}: expected {old.dtype} of shape {old.shape}, got {new.dtype} of {new.shape}"
        )
    kind = np.result_type(np.float32, new.dtype, old.dtype)
    change: NDArray[Any] = np.subtract(new, old, dtype=kind)
    return change

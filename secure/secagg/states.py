"""The exchanges of a round and the legal transitions of its two roles."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from propolis.secure.errors import PeerError, Refusal


class Exchange(IntEnum):
    """One request of the server and the devices' replies; ENCRYPT is the one of homomorphic encryption."""

    HELLO = 1
    PREPARE = 2
    UPLOAD = 3
    CONFIRM = 4
    UNMASK = 5
    ENCRYPT = 6

    @property
    def label(self) -> str:
        """Its name on the wire."""
        return self.name.lower()


class Phase(IntEnum):
    """What has been done in a round."""

    PREPARED = 1
    UPLOADED = 2
    CONFIRMED = 3
    UNMASKED = 4


Transitions = Mapping[tuple[Phase, Exchange], Phase]

# A round begins with PREPARED; there is no transition into it.
SEMI_HONEST: Transitions = {
    (Phase.PREPARED, Exchange.UPLOAD): Phase.UPLOADED,
    (Phase.UPLOADED, Exchange.UNMASK): Phase.UNMASKED,
}
MALICIOUS: Transitions = {
    (Phase.PREPARED, Exchange.UPLOAD): Phase.UPLOADED,
    (Phase.UPLOADED, Exchange.CONFIRM): Phase.CONFIRMED,
    (Phase.CONFIRMED, Exchange.UNMASK): Phase.UNMASKED,
}


def following(phase: Phase, exchange: Exchange, malicious: bool) -> Phase:
    """The phase after an exchange.

    Raises:
        PeerError: the exchange is not the round's next one.
    """
    try:
        return (MALICIOUS if malicious else SEMI_HONEST)[phase, exchange]
    except KeyError:
        raise PeerError(
            Refusal.PHASE, f"the round is {phase.name.lower()}: {exchange.label} is not what comes next"
        ) from None

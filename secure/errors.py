"""Every error that Propolis raises on purpose.

PropolisError
├── UsageError          local misuse: the caller, a file or a flag is wrong; the command line exits with 2
│   └── StorageError    a file could not be written (disk full, no permission); what was there stays whole
├── RefusedError        what a peer sent, or asked for, is refused; carries a `Refusal` code
│   ├── PeerError       it is malformed, out of turn, inconsistent, or against this side's policy
│   └── TrustError      it is not authentic: a signature, a key, a descriptor or a roster does not hold
├── TooFewPeersError    a round ended with fewer devices than it may
└── CancelledError      the run was asked to stop

A message says what was expected, what came and from whom, in one line; never a key, a share or a plaintext. Only
the code of a RefusedError crosses the wire.
"""

from __future__ import annotations

from enum import IntEnum


class PropolisError(Exception):
    """The root of the tree: catch it to catch all of ours."""


class UsageError(PropolisError):
    """The caller asked for something impossible; the message says what to do instead."""


class StorageError(UsageError):
    """A file could not be written; its previous version is untouched."""


class TooFewPeersError(PropolisError):
    """Fewer devices than the configured minimum are connected or survived a round."""


class CancelledError(PropolisError):
    """The run was asked to stop while it waited for devices."""


class Refusal(IntEnum):
    """Why a peer was refused: all that an error reply says."""

    MALFORMED = 1  # bytes that are no message of ours, or a field out of its bounds
    UNPROTECTED = 2  # an exchange outside of the protocol, which would show this device's own values
    NOT_ENROLLED = 3  # this device belongs to no federation, or to another one
    ROSTER = 4  # missing, expired, forged or older than one already seen
    IDENTITY = 5  # a descriptor that is forged, revoked, unknown, or the second one of its index
    KEYS = 6  # a prekey or mask key that is forged, reused, weak or somebody else's
    POLICY = 7  # below a floor, or above a ceiling, that is set on this device
    STALE = 8  # a round that is not newer than one already taken part in
    PHASE = 9  # an exchange that is not this round's next one
    REPEATED = 10  # another request for an exchange that has been answered
    SETS = 11  # neighbours, alive or dropped devices that are not what they must be
    SHARES = 12  # sealed shares or their proofs that do not hold
    MODEL = 13  # a model, or an update, whose names, shapes or types are not those announced
    NOT_FINITE = 14  # training made the update infinite or NaN
    WEIGHT = 15  # a weight that is not positive or exceeds the public maximum
    REVEALS = 16  # sums over this model have been revealed as often as this device allows
    TRAINING_FAILED = 17  # the application raised
    STORAGE = 18  # this device's state could not be read or written
    UNKNOWN_PEER = 19  # a neighbour that this device has no descriptor of: the server must send it once more
    BASE = 20  # the model cannot be rebuilt from what this device has: it needs the whole
    RELEASE_KEY = 21  # a package that no key of the federation's root stands behind: forged, expired or revoked
    PACKAGE = 22  # a package, or its key, that is not what its manifest says, or meant for somebody else
    EXPIRED = 23  # a manifest whose time is over
    ROLLED_BACK = 24  # a package that is not newer than one already trusted
    PROBE = 25  # a model that does not run, or not as it should, on the golden batch
    HE_KEY = 26  # a key of homomorphic encryption that no delegated holder stands behind, or that is another one
    CIPHERTEXT = 27  # an encrypted sum that is not that of the devices it is said to be of
    EXPORT = 28  # an encrypted model, on a device that was not told its task or lacks what opens and exports it

    @property
    def reason(self) -> str:
        """The code in words, as it travels in an error reply."""
        return self.name.lower().replace("_", "-")


class RefusedError(PropolisError):
    """What a peer sent is refused.

    Attributes:
        refusal: the code, the only part that may travel.
        culprit: index of the device that cheated, where it is known to have.
    """

    def __init__(self, refusal: Refusal, message: str, culprit: int | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.culprit = culprit


class PeerError(RefusedError):
    """A peer's message is malformed, out of turn, inconsistent, or against this side's policy."""


class TrustError(RefusedError):
    """A peer's message is not authentic."""

"""The one-time token: what a person carries from the federation's root to a new device."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Self

from propolis.protos import link_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.identity import DIGEST_BYTES, KEY_BYTES, Invitation, Signed, SigningKey, verify_invitation
from propolis.secure.wire import decode_exactly, encode, sized, version_field

_PREFIX = "propolis-1-"
_CHECKSUM_BYTES = 4
_LONGEST = 4096


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """An invitation with its key, and whom the new device is to trust.

    Attributes:
        invitation: signed by the root.
        private_key: the invitation's: who has it takes the place.
        root_key: the federation's root, 32 bytes.
        authority: SHA-256 of the TLS authority's certificate, DER.
    """

    invitation: Signed
    private_key: bytes = sized(KEY_BYTES)
    root_key: bytes = sized(KEY_BYTES)
    authority: bytes = sized(DIGEST_BYTES)
    version: int = version_field()

    @property
    def key(self) -> SigningKey:
        """The invitation's key."""
        return SigningKey(self.private_key)

    def verified(self) -> Invitation:
        """The invitation, which must be the root's and for the token's key.

        Raises:
            UsageError: the token contradicts itself.
        """
        try:
            invitation = verify_invitation(self.root_key, self.invitation)
        except PropolisError as error:
            raise UsageError(f"the token does not hold: {error}") from None
        if self.key.public != invitation.public_key:
            raise UsageError("the token does not hold: its key is not the invitation's")
        return invitation

    def to_text(self) -> str:
        """One word of about 400 characters."""
        data = encode(self, pb.Token)
        return _PREFIX + _encoded(data + _checksum(data))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The token that `to_text` wrote; white space, as of a line that was broken, does not count.

        Raises:
            UsageError: it is none, or mistyped, or cut.
        """
        word = "".join(text.split())
        if not word.startswith(_PREFIX) or len(word) > _LONGEST:
            raise UsageError(f"this is no token: one begins with {_PREFIX}")
        data = _decoded(word.removeprefix(_PREFIX))
        body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if not body or checksum != _checksum(body):
            raise UsageError("the token is mistyped or cut: copy the whole of it")
        try:
            return decode_exactly(cls, body, pb.Token)
        except PropolisError:
            raise UsageError("the token is of another version of Propolis") from None


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(word: str) -> bytes:
    """The bytes that are written like this and not otherwise; none where there are none."""
    try:
        data = base64.urlsafe_b64decode(word.encode("ascii") + b"=" * (-len(word) % 4))
    except (binascii.Error, UnicodeEncodeError):
        return b""
    return data if _encoded(data) == word else b""


def _checksum(data: bytes) -> bytes:
    return labels.digest(labels.TOKEN, data)[:_CHECKSUM_BYTES]

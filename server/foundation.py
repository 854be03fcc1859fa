"""The keys that a federation begins with.

DIR/root.key        the root's private key; with `root_online` in DIR/server
DIR/invitations/    the tokens by index, beside the key
DIR/server/         all that the server needs; nothing of the root but what it signed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from propolis.link.authority import Authority, names_of
from propolis.link.certificates import CERTIFICATE_FILE, KEY_FILE, load_pem, new_tls_key, parse_certificate, to_pem
from propolis.link.keys import save_private_key
from propolis.secure.errors import UsageError
from propolis.secure.identity import Root, Roster, SigningKey
from propolis.server.roster import save_roster
from propolis.storage import write_atomically

ROOT_KEY_FILE, SERVER_FOLDER, INVITATIONS_FOLDER = "root.key", "server", "invitations"
_DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Foundation:
    """What a new federation is made of.

    Attributes:
        names: DNS names and IP addresses of the server.
        root_online: whether the server keeps the root's key.
        valid_days: how long the roster and the server's certificate are valid.
        passphrase: encrypts the root's key.
        server_passphrase: encrypts the server's and the authority's.
    """

    names: Sequence[str]
    root_online: bool = False
    valid_days: int = 365
    passphrase: bytes | None = field(default=None, repr=False)
    server_passphrase: bytes | None = field(default=None, repr=False)


def found(folder: Path, foundation: Foundation, now: float) -> None:
    """Make a new federation without devices; the roster is written last.

    Args:
        folder: a new or an empty one.
        foundation: its names and keys.
        now: seconds since 1970.

    Raises:
        UsageError: the folder is not empty, or a name is none.
        StorageError: something could not be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty: a new federation needs a new folder")
    key, server_key = Ed25519PrivateKey.generate(), new_tls_key()
    root = Root(SigningKey(key.private_bytes_raw()))
    authority = Authority.create(root.federation, now)
    certificate = authority.issue_for_server(server_key.public_key(), foundation.names, foundation.valid_days, now)

    server = folder / SERVER_FOLDER
    home = server if foundation.root_online else folder
    server.mkdir(mode=0o700, parents=True)
    (home / INVITATIONS_FOLDER).mkdir(mode=0o700)
    save_private_key(home / ROOT_KEY_FILE, key, foundation.passphrase)
    authority.save(server, foundation.server_passphrase)
    save_private_key(server / KEY_FILE, server_key, foundation.server_passphrase)
    write_atomically(server / CERTIFICATE_FILE, to_pem(certificate))
    roster = Roster(root.federation, 1, int(now) + foundation.valid_days * _DAY_S, ())
    save_roster(server, root.public_key, root.sign_roster(roster))


def renew_server_certificate(
    folder: Path, names: Sequence[str], days: int, passphrase: bytes | None, now: float
) -> None:
    """A new certificate for the server's key. It takes the authority's key; the root's is not needed.

    Args:
        folder: the server's.
        names: DNS names and IP addresses; those of the last certificate where there are none.
        days: how long it is valid.
        passphrase: of the authority's key.
        now: seconds since 1970.

    Raises:
        UsageError: the authority's key cannot be used, or a name is none.
    """
    authority, last = Authority.load(folder, passphrase), parse_certificate(load_pem(folder / CERTIFICATE_FILE))
    key = last.public_key()
    if not isinstance(key, EllipticCurvePublicKey):
        raise UsageError(f"{folder / CERTIFICATE_FILE} is not for a key of Propolis")
    certificate = authority.issue_for_server(key, names or names_of(last), days, now)
    write_atomically(folder / CERTIFICATE_FILE, to_pem(certificate))

"""Who may take part in a protected run of real devices, and under which key; found out before anything starts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from propolis.secure.errors import UsageError
from propolis.secure.he.keys import PublicKey
from propolis.server.app import Members
from propolis.server.he_served import ServedKey, key_for, largest_round, require_room
from propolis.server.membership import Membership
from propolis.settings import Settings


def members_of(settings: Settings, membership: Membership, he_key: ServedKey, journal: Path) -> Members | None:
    """The members of a run's federation; None where it is not protected.

    Args:
        settings: of the run.
        membership: who belongs to the federation, as it is now.
        he_key: of homomorphic encryption, as it is now.
        journal: see `SecureGrid`.

    Raises:
        UsageError: the settings lack what is public, or the federation has no key that the run may be under.
    """
    if not settings.is_protected:
        return None
    if settings.max_weight is None:
        raise UsageError("max_weight: say the largest number of examples that a device may have; devices cut off more")
    # Devices are told the codec's randomness anyway; from the seed, a run that crashed goes on as if it had not.
    seed = settings.seed
    members = Members(membership.roster, settings.max_weight, seed, lambda: membership.roster, journal)
    if not settings.is_encrypted:
        return members
    members, key = under_key(members, he_key, settings)
    require_room(key.parameters.clients, largest_round(settings, membership.roster.roster))
    return members


def under_key(members: Members, he_key: ServedKey, settings: Settings) -> tuple[Members, PublicKey]:
    """The members of an encrypted run, and the key that it begins under; raises UsageError as `key_for`."""
    newest_key = partial(key_for, he_key, settings)
    key = newest_key()
    return replace(members, he_key=key, newest_key=newest_key), key

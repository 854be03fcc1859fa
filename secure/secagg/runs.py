"""The names of runs: they say when a run began, so that a device need not remember all that there ever were.

A device answers no attempt twice. It remembers the last attempts of some runs; of a run that it has forgotten it would
not know. So whatever began no later than the latest that it has forgotten is refused: it may be one of those.
"""

from __future__ import annotations

from propolis.secure.shamir import RandomBytes

RUN_ID_BYTES = 16
_TIME_BYTES = 8
# A device's clock and the server's may differ so much; a run of a later time would outlive all others in memory.
MOST_AHEAD_MS = 3600 * 1000


def new_run_id(now: float, random_bytes: RandomBytes) -> bytes:
    """16 bytes: milliseconds since 1970, big-endian, and random ones.

    Args:
        now: seconds since 1970.
        random_bytes: such as `os.urandom`.
    """
    return int(now * 1000).to_bytes(_TIME_BYTES, "big") + random_bytes(RUN_ID_BYTES - _TIME_BYTES)


def began_at(run_id: bytes) -> int:
    """When a run began, as its name says, in milliseconds since 1970."""
    return int.from_bytes(run_id[:_TIME_BYTES], "big")

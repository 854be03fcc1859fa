"""How far two clocks may be apart: rosters, invitations and certificates end, and both sides must agree when."""

from __future__ import annotations

LARGEST_DIFFERENCE_S = 600


def clock_fault(clock: float, now: float) -> str | None:
    """What is wrong with a device's clock, in words; None where it is near enough.

    Args:
        clock: the device's, seconds since 1970.
        now: the server's.
    """
    difference = clock - now
    if abs(difference) <= LARGEST_DIFFERENCE_S:
        return None
    direction = "ahead of" if difference > 0 else "behind"
    return f"the device's clock is {_in_words(abs(difference))} {direction} the server's: set it right"


def _in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"

"""Clipping: no device's update is longer than a public bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def l2_norm(x: NDArray[np.floating[Any]]) -> float:
    """The length of a vector, summed in double precision; x: (d,)."""
    return float(np.sqrt(np.einsum("i,i->", x, x, dtype=np.float64)))


def clip_l2(x: NDArray[np.float32], bound: float) -> tuple[float, bool]:
    """Scale a vector down, in place, until it is no longer than a bound.

    Args:
        x: (d,) finite.
        bound: largest L2 norm that is let through.

    Returns:
        The norm that x had, and whether it was scaled down.
    """
    norm = l2_norm(x)
    if norm <= bound:
        return norm, False
    x *= np.float32(bound / norm)
    return norm, True

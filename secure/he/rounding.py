"""Hiding how a plaintext was rounded into its ciphertext from somebody who can decrypt the sum of many.

A ciphertext holds round(q m / t) and noise. So the sum of ciphertexts says a little more than the sum of messages: what
they were rounded by, added up, under noise that is only some ten times larger. Where a device's message is to be hidden
from who has the key, its ciphertext holds a Gaussian around q m / t instead, rounded. Then what depends on the single
messages of h honest devices, beside their sum, is about exp(-2 pi^2 s^2 (h - 1) / h) for a coefficient (Poisson
summation): with s = 2, 2^-57 for two devices and 2^-76 for three, before SEAL's own noise, which is larger, is on top.
Numbers of double precision end at 8.6 deviations, so nothing below 2^-56 is claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod, tau

import numpy as np
from numpy.typing import NDArray

from propolis.secure.he.field import Elements
from propolis.secure.he.parameters import BLUR_DEVIATION, Parameters

_WORD = 8


def blur(coefficients: Elements, parameters: Parameters, random_bytes: Callable[[int], bytes]) -> NDArray[np.int64]:
    """What to add to the first polynomial of a ciphertext, so that it holds a Gaussian around q m / t.

    Args:
        coefficients: (N,) m as a polynomial, in [0, t).
        parameters: of the ciphertext.
        random_bytes: such as `os.urandom`.

    Returns:
        (N,) small integers.
    """
    t = parameters.plain_modulus
    half = (t + 1) // 2  # SEAL adds it before it divides
    # How far q m / t is above what SEAL rounds it to, as a share of t.
    left = (coefficients.astype(object) * (prod(parameters.primes) % t) + half) % t - half
    above = left.astype(np.float64) / t
    return np.rint(above + BLUR_DEVIATION * _gaussian(len(coefficients), random_bytes)).astype(np.int64)


def _gaussian(count: int, random_bytes: Callable[[int], bytes]) -> NDArray[np.float64]:
    """(count,) an even number of standard normal numbers (Box and Muller, 1958)."""
    words = np.frombuffer(random_bytes(_WORD * count), "<u8").reshape(2, -1)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), tau * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])

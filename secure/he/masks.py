"""Masks on ciphertexts: what secure aggregation adds to a ring vector, added to ciphertexts and their tags.

Who has the key of the federation could open any device's ciphertext that it gets hold of. Under a mask nobody can: the
first polynomial and the tag are uniform modulo each prime then, and the second polynomial tells nothing of the message.
The masks of a sum's devices come off the sum as they come off any other, and what is left is the ciphertext, and the
tag, that the sum would have been without them: to the bit, so that tags hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from propolis.secure.he.field import UniformElements, add, subtract
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.tag import REPETITIONS, Tag
from propolis.secure.prg import LANE_STREAM, Mask

# One for each prime; the lanes have the one before.
_FIRST_STREAM = LANE_STREAM + 1


class CiphertextMasks:
    """The sum of some masks, chunk by chunk.

    Args:
        masks: to add, with their signs.
        parameters: of the ciphertexts.
    """

    def __init__(self, masks: Sequence[Mask], parameters: Parameters) -> None:
        self._parameters = parameters
        self._streams = [
            (prime, [(UniformElements(mask.seed, prime, _FIRST_STREAM + place), mask.sign) for mask in masks])
            for place, prime in enumerate(parameters.primes)
        ]

    def onto(self, polynomial: NDArray[np.uint64], tag: Tag) -> tuple[NDArray[np.uint64], Tag]:
        """The next chunk's masks added.

        Args:
            polynomial: (primes, N) the first one of a ciphertext.
            tag: (primes, 4) of the ciphertext.
        """
        masked = np.concatenate([polynomial, tag], axis=1)
        for row, (prime, streams) in zip(masked, self._streams, strict=True):
            for stream, sign in streams:
                combine = add if sign > 0 else subtract
                row[:] = combine(row, stream.take(len(row)), prime)
        return masked[:, :-REPETITIONS], masked[:, -REPETITIONS:]

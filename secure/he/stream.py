"""A vector of integers as ciphertexts, chunk by chunk: encrypted by a device, added up, and opened by every device.

    encrypt:  values -> pack -> encrypt -> tag (-> + masks)
    sum:      add up (-> - masks)
    open:     verify the tag -> decrypt -> unpack

What travels for a chunk is its ciphertext and then its tag.

Nothing here runs in threads: TenSEAL holds Python's lock while SEAL computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he.bfv import Adder, Decryptor, Encryptor
from propolis.secure.he.masks import CiphertextMasks
from propolis.secure.he.packing import pack, unpack
from propolis.secure.he.parameters import Parameters
from propolis.secure.he.tag import (
    Tag,
    Tags,
    add_tags,
    refused,
    require_set,
    tag_bytes,
    tag_from_wire,
    tag_to_wire,
)
from propolis.secure.prg import Mask


def encrypt_vector(
    values: NDArray[np.signedinteger[Any]],
    encryptor: Encryptor,
    tags: Tags,
    device: int,
    masks: Sequence[Mask] = (),
) -> Iterator[bytes]:
    """A device's ciphertexts and their tags, one by one.

    Args:
        values: (d,) integers in [-2^(b-1), 2^(b-1)), b being the parameters' bits; real numbers become such on a
            `propolis.secure.codec.quantize.Grid`.
        encryptor: of the round's key.
        tags: of the round, for as many chunks as the values fill.
        device: this one's index.
        masks: to add to ciphertexts and tags, so that not even who has the key can open them.

    Raises:
        UsageError: a value is out of range, or the number of chunks is another one.
    """
    parameters = encryptor.parameters
    if parameters.ciphertexts(len(values)) != tags.chunks:
        raise UsageError(f"{len(values)} values fill {parameters.ciphertexts(len(values))} chunks, not {tags.chunks}")
    streams = CiphertextMasks(masks, parameters)
    for chunk, own in enumerate(tags.of_device(device)):
        slots = pack(values[chunk * parameters.values : (chunk + 1) * parameters.values], parameters)
        data, residues = encryptor.encrypt_blurred(slots) if masks else encryptor.encrypt(slots)
        tag = add_tags(tags.of_residues(chunk, residues), own, parameters)
        if masks:
            first, tag = streams.onto(residues[0], tag)
            data = encryptor.with_first(data, first)
        yield data + tag_to_wire(tag)


class Totals:
    """The running sums of a round, on a server that can open none: memory for one upload and for the sums.

    Args:
        adder: of the round's key.
        chunks: ciphertexts of an upload.
    """

    def __init__(self, adder: Adder, chunks: int) -> None:
        self._adder, self._chunks = adder, chunks
        self._sums: list[tuple[Any, Tag]] = []
        self.uploads = 0

    def add(self, upload: Iterable[bytes]) -> None:
        """Add the ciphertexts of one device, all of them or none.

        Args:
            upload: in the order of the chunks.

        Raises:
            PeerError: one is malformed or under another key, or there are more or fewer; nothing is added then.
            UsageError: as many uploads as the parameters have room for have been added.
        """
        if self.uploads == self._adder.parameters.clients:
            raise UsageError(f"the parameters have room for {self.uploads} devices, not for one more")
        read: list[tuple[Any, Tag]] = []
        for data in upload:
            if len(read) == self._chunks:
                raise PeerError(Refusal.MALFORMED, f"an upload of more than {self._chunks} ciphertexts")
            ciphertext, tag = _split(data, self._adder.parameters)
            read.append((self._adder.read(ciphertext), tag))
        if len(read) != self._chunks:
            raise PeerError(Refusal.MALFORMED, f"an upload of {len(read)} ciphertexts, not {self._chunks}")
        self._sums = [self._added(*pair) for pair in zip(self._sums, read, strict=True)] if self.uploads else read
        self.uploads += 1

    def ciphertexts(self) -> Iterator[bytes]:
        """The sums as they travel to the devices; raises UsageError before the first upload."""
        if not self.uploads:
            raise UsageError("nothing has been added up")
        return (self._adder.write(ciphertext) + tag_to_wire(tag) for ciphertext, tag in self._sums)

    def without(self, masks: Sequence[Mask]) -> Iterator[bytes]:
        """The sums once masks have been added to them, which take away those of the devices; as `ciphertexts`."""
        streams = CiphertextMasks(masks, self._adder.parameters)
        for ciphertext, tag in self._sums:
            residues = self._adder.residues(ciphertext)
            first, opened = streams.onto(residues[0], tag)
            yield self._adder.whole(np.stack([first, residues[1]])) + tag_to_wire(opened)

    def _added(self, total: tuple[Any, Tag], one: tuple[Any, Tag]) -> tuple[Any, Tag]:
        return self._adder.add(total[0], one[0]), add_tags(total[1], one[1], self._adder.parameters)


@dataclass(frozen=True, slots=True)
class Declared:
    """What a server says of a sum, and what a device insists on.

    Attributes:
        alive: indices of the devices whose ciphertexts are in it.
        floor: the fewest devices that this device opens a sum of.
        count: number of values.
    """

    alive: Collection[int]
    floor: int
    count: int


def open_vector(
    ciphertexts: Iterable[bytes], decryptor: Decryptor, tags: Tags, declared: Declared
) -> NDArray[np.int64]:
    """The sums of the values, once every tag has been found to hold; nothing is decrypted before its tag.

    Args:
        ciphertexts: of the sums, in the order of the chunks.
        decryptor: of the round's key.
        tags: of the round.
        declared: what the sum is said to be.

    Raises:
        PeerError: with `Refusal.CIPHERTEXT` when this is not the sum over that set, whatever it is; with another code
            when the bytes are no ciphertexts under this key. Neither depends on the secret key.
        UsageError: the number of chunks is not that of the values.
    """
    parameters = decryptor.parameters
    if parameters.ciphertexts(declared.count) != tags.chunks:
        raise UsageError(f"{declared.count} values do not fill {tags.chunks} chunks")
    require_set(declared.alive, declared.floor, parameters)
    expected = tags.of_devices(declared.alive)
    sums = np.empty(tags.chunks * parameters.values, np.int64)
    chunk = -1
    for chunk, data in enumerate(ciphertexts):
        if chunk == tags.chunks:
            raise refused()
        ciphertext, tag = _split(data, parameters)
        tags.require(chunk, decryptor.residues(ciphertext), tag, expected[chunk])
        slots = decryptor.decrypt(ciphertext)
        sums[chunk * parameters.values : (chunk + 1) * parameters.values] = unpack(
            slots, parameters, len(declared.alive), parameters.values
        )
    if chunk + 1 != tags.chunks:
        raise refused()
    return sums[: declared.count]


def _split(data: bytes, parameters: Parameters) -> tuple[bytes, Tag]:
    """Ciphertext and tag."""
    at = max(0, len(data) - tag_bytes(parameters))
    return data[:at], tag_from_wire(data[at:], parameters)

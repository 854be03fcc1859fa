"""A server process that adds up encrypted vectors: ``python -m`` this module.

Arguments: most devices, bits of a value, the key's id in hexadecimal, ciphertexts of an upload, uploads, and a file for
the figures. The uploads come on standard input, their ciphertexts one after another; the sums go to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from propolis.secure.he.bfv import Scheme
from propolis.secure.he.parameters import choose
from propolis.secure.he.stream import Totals
from propolis.secure.he.tag import tag_bytes
from propolis.simulations.bench.memory import forget_peak, peak


class Waited:
    """Ciphertexts from standard input, without the seconds until they came."""

    def __init__(self, size: int, chunks: int) -> None:
        self._size, self._chunks = size, chunks
        self.seconds = 0.0

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(self._chunks):
            began = time.perf_counter()
            data = sys.stdin.buffer.read(self._size)
            self.seconds += time.perf_counter() - began
            yield data


def serve(clients: int, value_bits: int, key_id: bytes, chunks: int, uploads: int) -> dict[str, float]:
    """Add up what comes, and write the sums; the most memory in bytes, and seconds for an upload."""
    scheme = Scheme(choose(clients, value_bits))
    size, totals, seconds = scheme.upload_bytes + tag_bytes(scheme.parameters), Totals(scheme.adder(key_id), chunks), []
    forget_peak()
    for _ in range(uploads):
        upload, began = Waited(size, chunks), time.perf_counter()
        totals.add(upload)
        seconds.append(time.perf_counter() - began - upload.seconds)
    for ciphertext in totals.ciphertexts():
        sys.stdout.buffer.write(ciphertext)
    sys.stdout.buffer.flush()
    return {"peak": peak(), "add_s": median(seconds)}


if __name__ == "__main__":
    most, bits, key, count, sent, figures = sys.argv[1:]
    seen = serve(int(most), int(bits), bytes.fromhex(key), int(count), int(sent))
    Path(figures).write_text(json.dumps(seen), encoding="utf-8")

"""Whether bytes tell anything: Pearson's chi-square test over their values."""

from __future__ import annotations

import numpy as np

# 255 degrees of freedom; uniform bytes exceed it once in 10^9.
CHI_SQUARE_LIMIT = 415.0


def looks_uniform(data: bytes) -> bool:
    counts, expected = np.bincount(np.frombuffer(data, np.uint8), minlength=256), len(data) / 256
    return float(np.sum((counts - expected) ** 2)) / expected < CHI_SQUARE_LIMIT

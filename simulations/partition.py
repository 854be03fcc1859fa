"""Who gets which example: every example goes to exactly one device, and every device gets at least one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from propolis.secure.errors import UsageError
from propolis.task import Examples

_LARGEST_ALPHA = 1e6  # as good as uniform; far beyond it the sampler overflows
_FORMS = "iid, dirichlet:ALPHA, shards:CLASSES or natural"


@dataclass(frozen=True, slots=True)
class Partition:
    """How to divide examples over devices.

    Attributes:
        kind: ``iid`` shuffles and deals; ``dirichlet`` draws each class's shares over the devices from
            Dirichlet(alpha) (Hsu et al., 2019, arXiv 1909.06335); ``shards`` gives each device `classes` classes
            (the pathological split of McMahan et al., 2017, arXiv 1602.05629); ``natural`` keeps each user whole.
        alpha: concentration; small is skewed.
        classes: classes per device.
    """

    kind: Literal["iid", "dirichlet", "shards", "natural"]
    alpha: float = 0.0
    classes: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``iid``, ``dirichlet:0.5``, ``shards:2`` or ``natural``.

        Raises:
            UsageError: the text is none of these, or its number is out of range.
        """
        kind, _, number = text.partition(":")
        try:
            if kind == "dirichlet" and 0 < float(number) <= _LARGEST_ALPHA:
                return cls("dirichlet", alpha=float(number))
            if kind == "shards" and int(number) >= 1:
                return cls("shards", classes=int(number))
        except ValueError:
            pass
        if text == "iid":
            return cls("iid")
        if text == "natural":
            return cls("natural")
        raise UsageError(f"partition: expected {_FORMS}, got '{text}'")

    def split(self, examples: Examples, clients: int, seed: int) -> list[np.ndarray]:
        """Sorted positions (int64) of each device's examples; together they are 0..n-1, once each.

        Raises:
            UsageError: the request is infeasible; the message gives the numbers.
        """
        if clients > len(examples):
            raise UsageError(f"partition: {clients} clients cannot share {len(examples)} examples")
        rng = np.random.default_rng([seed, 0x5EED])
        if self.kind == "iid":
            parts = np.array_split(rng.permutation(len(examples)), clients)
        elif self.kind == "natural":
            parts = _by_user(examples, clients, rng)
        elif self.kind == "dirichlet":
            parts = _by_dirichlet(_classes(examples), clients, self.alpha, rng)
        else:
            parts = _by_shards(_classes(examples), clients, self.classes, rng)
        return [np.sort(part) for part in parts]


def _classes(examples: Examples) -> list[np.ndarray]:
    """Positions of each class's examples."""
    labels = examples.labels.numpy()
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"partition: integer class labels of shape (n,) are needed, got {labels.dtype} of shape {labels.shape}; "
            "use iid or natural"
        )
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _by_dirichlet(classes: list[np.ndarray], clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for positions in classes:
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(positions)).astype(np.int64)
        for part, piece in zip(parts, np.split(rng.permutation(positions), cuts), strict=True):
            part.append(piece)
    return _fill_empty([np.concatenate(pieces) for pieces in parts])


def _by_shards(classes: list[np.ndarray], clients: int, per_client: int, rng: np.random.Generator) -> list[np.ndarray]:
    if per_client > len(classes):
        raise UsageError(f"partition: shards:{per_client} asks for more than the {len(classes)} classes there are")
    if clients * per_client < len(classes):
        raise UsageError(
            f"partition: {clients} clients with {per_client} classes each leave some of the {len(classes)} "
            "classes to nobody"
        )
    holders: list[list[int]] = [[] for _ in classes]
    for client in range(clients):  # each takes the classes that the fewest hold, ties broken at random
        fewest_first = np.lexsort((rng.random(len(classes)), np.array([len(held) for held in holders])))
        for label in fewest_first[:per_client]:
            holders[label].append(client)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for positions, held in zip(classes, holders, strict=True):
        if len(positions) < len(held):
            raise UsageError(f"partition: a class of {len(positions)} examples cannot serve {len(held)} clients")
        for client, piece in zip(held, np.array_split(rng.permutation(positions), len(held)), strict=True):
            parts[client].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def _by_user(examples: Examples, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    if examples.users is None:
        raise UsageError("partition: this task's examples name no users; use iid, dirichlet:ALPHA or shards:CLASSES")
    users, owner = np.unique(examples.users, return_inverse=True)
    if clients > len(users):
        raise UsageError(f"partition: {clients} clients cannot share {len(users)} users")
    client_of_user = np.arange(len(users)) % clients
    client_of_example = rng.permutation(client_of_user)[owner]
    return [np.flatnonzero(client_of_example == client) for client in range(clients)]


def _fill_empty(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Give each device without an example one of the largest device's."""
    for index, part in enumerate(parts):
        if len(part) == 0:
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            parts[index], parts[largest] = parts[largest][-1:], parts[largest][:-1]
    return parts

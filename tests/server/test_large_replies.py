"""A consumer that folds replies as it pulls them holds one at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from linked import WAIT_S, link_of

from propolis.server import link_grid
from propolis.server.courier import Request
from propolis.server.exchange import MeteredGrid, exchange

DEVICES = 4


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What refers to itself stays until it is looked for on purpose."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("look", [False, True])
def test_a_reply_that_was_dropped_is_gone_before_the_next_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: bool
) -> None:
    made: list[weakref.ref[RecordDict]] = []
    alive: list[int] = []

    def message_of(request: Request, make=link_grid._message_of) -> Message:  # type: ignore[no-untyped-def]
        alive.append(sum(each() is not None for each in made))
        reply: Message = make(request)
        made.append(weakref.ref(reply.content))
        return reply

    monkeypatch.setattr(link_grid, "_COLLECT_EVERY", 1000)
    monkeypatch.setattr(link_grid, "_message_of", message_of)
    with link_of(tmp_path, DEVICES) as link:
        outgoing = link.messages(np.zeros(1000, np.float32))
        for reply in exchange(MeteredGrid(link.grid), outgoing, timeout=WAIT_S):
            if look:
                assert len(reply.content.array_records) == 1
            del reply
    assert alive == [0] * DEVICES

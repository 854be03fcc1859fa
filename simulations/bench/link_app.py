"""Flower apps that look at themselves while the link is under load; the run's configuration says how much of it.

Each ServerApp writes its figures to the file ``out``, as `propolis.simulations.bench.echo_app` does.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from propolis.server.exchange import exchange
from propolis.simulations.bench import echo_app
from propolis.simulations.bench.memory import forget_peak, peak, resident_of

crowd_server = ServerApp()
large_server = ServerApp()
large_client = ClientApp()

_BLOCK = 2**20


@crowd_server.main()
def crowd(grid: Grid, context: Context) -> None:
    """With ``nodes`` connected: be idle for ``idle`` seconds, look at the memory, and time ``exchanges``."""
    config, connected_at = context.run_config, time.monotonic()
    deadline = connected_at + float(config["timeout"])
    nodes = echo_app.connected_nodes(grid, int(config["nodes"]), deadline)
    time.sleep(float(config["idle"]))
    resident = resident_of(os.getpid())
    seconds = [echo_app.exchange(grid, nodes, RecordDict(), deadline) for _ in range(int(config["exchanges"]))]
    _write(config["out"], {"connected_at": connected_at, "resident": resident, "seconds": seconds})


@large_server.main()
def collect(grid: Grid, context: Context) -> None:
    """Ask ``nodes`` for ``parameters`` float32 values each, and add them up one reply at a time.

    Raises:
        RuntimeError: a device failed or was lost, or the sum is wrong.
    """
    config = context.run_config
    count, deadline_s = int(config["parameters"]), float(config["timeout"])
    nodes = echo_app.connected_nodes(grid, int(config["nodes"]), time.monotonic() + deadline_s)
    asked = RecordDict({"asked": ConfigRecord({"parameters": count})})
    before = resident_of(os.getpid())
    forget_peak()
    began = time.monotonic()
    total, replies = np.zeros(count, np.float32), 0
    for reply in exchange(grid, [Message(asked, node, "train") for node in nodes], timeout=deadline_s):
        if reply.has_error():
            raise RuntimeError(f"a device failed: {reply.error.reason}")
        (array,) = reply.content.array_records["values"].values()
        total += np.frombuffer(array.data, np.float32, offset=len(array.data) - total.nbytes)
        replies += 1
        del reply, array  # or they would be held while the next one is made
    seconds, grown = time.monotonic() - began, peak() - before
    if replies != len(nodes) or not np.array_equal(total, values(count) * len(nodes)):
        raise RuntimeError(f"{replies} of {len(nodes)} devices answered, or their sum is wrong")
    _write(config["out"], {"seconds": seconds, "grown": grown})


@large_client.train()
def answer(message: Message, context: Context) -> Message:
    """As many values as were asked for."""
    count = int(message.content.config_records["asked"]["parameters"])  # type: ignore[arg-type]
    return Message(RecordDict({"values": ArrayRecord([values(count)])}), reply_to=message)


def values(count: int) -> NDArray[np.float32]:
    """What every device answers: (count,) float32 whose sums over a few devices are exact."""
    return np.resize(np.arange(_BLOCK, dtype=np.float32), count)


def _write(out: Any, figures: dict[str, Any]) -> None:
    Path(str(out)).write_text(json.dumps(figures), encoding="utf-8")

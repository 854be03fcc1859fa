"""A Flower app that does nothing but exchange messages: what it measures is the engine that carries them.

It runs unchanged on Flower's own SuperLink, on our link and on the local grid, so it imports nothing of Propolis. The
run's configuration says how many ``exchanges``, of how many ``parameters``, with how many ``nodes``, for how long at
most (``timeout``, in seconds), and to which file the figures go (``out``).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()
client_app = ClientApp()

_POLL_S = 0.1


@client_app.train()
def echo(message: Message, context: Context) -> Message:
    """Send the content back."""
    return Message(message.content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Time the exchanges and write ``{"seconds": [...], "nodes": n}`` to the file ``out``.

    Raises:
        TimeoutError: the nodes are not there, or do not answer, in time.
        RuntimeError: a reply is not the echo.
    """
    config = context.run_config
    deadline = time.monotonic() + float(config["timeout"])
    nodes = connected_nodes(grid, int(config["nodes"]), deadline)
    content = random_content(int(config["parameters"]))
    seconds = [exchange(grid, nodes, content, deadline) for _ in range(int(config["exchanges"]))]
    out = Path(str(config["out"]))
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps({"seconds": seconds, "nodes": len(nodes)}), encoding="utf-8")
    partial.replace(out)  # whole, or not there: somebody may be waiting for it


def connected_nodes(grid: Grid, count: int, deadline: float) -> list[int]:
    """The ids of `count` nodes, as soon as so many are connected."""
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {count} nodes, {len(nodes)} are connected")
        time.sleep(_POLL_S)
    return nodes[:count]


def random_content(parameters: int) -> RecordDict:
    """So many float32 values that no engine can make smaller; nothing for 0."""
    if parameters == 0:
        return RecordDict()
    values = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    return RecordDict({"arrays": ArrayRecord([values])})


def exchange(grid: Grid, nodes: list[int], content: RecordDict, deadline: float) -> float:
    """Seconds from the first message sent to the last reply received; what the replies hold is checked after that."""
    began = time.perf_counter()
    messages = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=deadline - time.monotonic()))
    seconds = time.perf_counter() - began
    if len(replies) != len(nodes):
        raise TimeoutError(f"expected {len(nodes)} replies, {len(replies)} came in time")
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"node {reply.metadata.src_node_id} failed: {reply.error.reason}")
        if reply.content != content:
            raise RuntimeError(f"node {reply.metadata.src_node_id} answered something else than it was sent")
    return seconds

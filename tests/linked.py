"""A real link on loopback: the server's end in its thread, devices' agents in another."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from harness import wait_until
from propolis.client.agent import Agent, AgentOptions
from propolis.client.runner import AppRunner, Worker
from propolis.link.certificates import DeviceName, Tls, load_tls
from propolis.link.frames import Beat, Begin, Cancel, Chunk, Frame, Hello, News, Received, decode_frame, encode_frame
from propolis.link.options import METHOD_PATH
from propolis.link.spool import Spools
from propolis.server.link import LinkOptions, LinkServer
from propolis.server.link_grid import LinkGrid
from propolis.server.membership import Membership
from propolis.server.post import Post
from propolis.simulations.federation import device_folder, make_federation
from propolis.simulations.linked import SERVER_FOLDER, write_linked_federation

RUN_ID = 4711
WAIT_S = 30.0


def echo_app() -> ClientApp:
    """Answers with what came."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


class Devices:
    """Agents of several devices on one loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.agents: list[Agent] = []
        self.futures: list[Any] = []
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def start(
        self,
        folder: Path,
        server: str,
        app: ClientApp | None = None,
        worker: Worker | None = None,
        node_config: dict[str, Any] | None = None,
        news: Callable[[float], None] = lambda _: None,
        **options: Any,
    ) -> int:
        """Run the agent of the device in a folder; its place among `agents` and `futures`."""
        tls = load_tls(folder)
        node_config = node_config or {"folder": str(folder)}
        runner = AppRunner(app or echo_app(), DeviceName.of(tls.certificate).node_id, node_config)

        async def make() -> Agent:
            chosen = AgentOptions(server, longest_pause=0.5, **options)
            return Agent(chosen, tls, runner, worker or Worker(), Spools(), news)

        agent = asyncio.run_coroutine_threadsafe(make(), self.loop).result(WAIT_S)
        self.agents.append(agent)
        self.futures.append(asyncio.run_coroutine_threadsafe(agent.run(), self.loop))
        return len(self.agents) - 1

    def stop(self, which: int) -> None:
        """End one agent and wait until it has."""
        self.loop.call_soon_threadsafe(self.agents[which].stop)
        with suppress(Exception):
            self.futures[which].result(WAIT_S)

    def close(self) -> None:
        for which in range(len(self.agents)):
            self.stop(which)
        self.loop.call_soon_threadsafe(self.loop.stop)


class Link:
    """A federation in a folder, its server and its devices.

    Attributes:
        folder: of the federation; `server/` and `device-N/` in it.
        server, grid, post, devices: the parts, to meddle with.
    """

    def __init__(self, folder: Path, devices: int = 3, **options: Any) -> None:
        self.folder = folder
        if not (folder / SERVER_FOLDER).exists():
            write_linked_federation(make_federation(devices, seed=0), folder)
        self._options = {"listen": "127.0.0.1:0", "run_id": RUN_ID, "run_config": {"rate": 0.5}, **options}
        self._stack = ExitStack()
        self.devices = Devices()
        self._stack.callback(self.devices.close)

    def __enter__(self) -> Link:
        self.start_server()
        return self

    def __exit__(self, *_: object) -> None:
        self.devices.close()
        self.stop_server()

    def start_server(self, port: int = 0) -> None:
        options = LinkOptions(**{**self._options, "listen": f"127.0.0.1:{port}"})
        self.post = Post(options.largest_message, Spools())
        server_folder = self.folder / SERVER_FOLDER
        self.membership = Membership(server_folder)
        self.server = LinkServer(options, load_tls(server_folder), self.membership, self.post)
        self.server.__enter__()
        self.grid = LinkGrid(self.post, self.server.wake, options.run_id)

    def stop_server(self) -> None:
        self.server.__exit__(RuntimeError, None, None)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def device(self, index: int) -> Path:
        return device_folder(self.folder, index)

    def tls(self, index: int) -> Tls:
        return load_tls(self.device(index))

    def node_id(self, index: int) -> int:
        return DeviceName.of(self.tls(index).certificate).node_id

    def start(self, *indices: int, address: str | None = None, **options: Any) -> None:
        """Start devices and wait until they are connected."""
        for index in indices:
            self.devices.start(self.device(index), address or self.address, **options)
        self.wait_until(lambda: {self.node_id(i) for i in indices} <= set(self.grid.get_node_ids()))

    def wait_until(self, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
        wait_until(condition, seconds)

    def messages(self, values: np.ndarray | None = None, nodes: list[int] | None = None) -> list[Message]:
        content = RecordDict({"c": ConfigRecord({"n": 1, "b": b"bytes"})})
        if values is not None:
            content["a"] = ArrayRecord({"x": Array(values)})
        return [Message(content, node, "train") for node in (nodes or self.grid.get_node_ids())]

    def exchange(self, values: np.ndarray | None = None, timeout: float = WAIT_S) -> list[Message]:
        return list(self.grid.send_and_receive(messages=self.messages(values), timeout=timeout))


@contextmanager
def link_of(folder: Path, devices: int = 3, **options: Any) -> Iterator[Link]:
    """A link whose first `devices` devices are connected."""
    with Link(folder, devices, **options) as link:
        link.start(*range(devices))
        yield link


class Raw:
    """A device that says what the test wants said, over a connection of its own.

    Args:
        link: where to connect.
        tls: what to show; without a key, no certificate is shown.
    """

    def __init__(self, link: Link, tls: Tls, address: str | None = None) -> None:
        key = (tls.private_key, tls.certificate) if tls.private_key else (None, None)
        credentials = grpc.ssl_channel_credentials(tls.authority, *key)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.secure_channel(address or link.address, credentials, options=options)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = self._channel.stream_stream(METHOD_PATH)(iter(self._out.get, None), timeout=WAIT_S)

    def say(self, frame: Frame | bytes) -> None:
        self._out.put(frame if isinstance(frame, bytes) else encode_frame(frame))

    def hello(self, node_id: int, clock: float | None = None) -> Frame:
        """Say hello as a new process; the first frame of the answer."""
        self.say(Hello(os.urandom(16), node_id, int(time.time() if clock is None else clock), b"", (), 1))
        return self.hear()

    def hear(self) -> Frame:
        """The next frame that is no heartbeat and no news."""
        while isinstance(frame := decode_frame(next(self.call)), (Beat, News)):
            pass
        return frame

    def last(self) -> Frame:
        """The frame that ends the stream; what was asked before is passed over."""
        while isinstance(frame := self.hear(), (Begin, Chunk, Cancel, Received)):
            pass
        return frame

    def end(self) -> grpc.StatusCode:
        """How the server ended the stream."""
        with suppress(grpc.RpcError):
            for _ in self.call:
                pass
        code: grpc.StatusCode = self.call.code()
        return code

    def close(self) -> None:
        self._out.put(None)
        self._channel.close()

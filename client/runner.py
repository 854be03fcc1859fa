"""Runs a Flower ClientApp for the requests that come over the link, in a thread beside it."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp

from propolis.client.cli import APP_THREAD
from propolis.flower import error_header, join_message, part_content, part_metadata, set_identity, set_message_id
from propolis.link.frames import LARGEST_HEADER
from propolis.link.transfers import Body

_log = logging.getLogger("propolis.client")


class AppRunner:
    """A loaded ClientApp with the context of the run.

    Args:
        app: any Flower ClientApp.
        node_id: the device's.
        node_config: set on the device; the server cannot change it.
        prepare: sees each message before the app does; it may take its time, and never raises.
    """

    def __init__(
        self,
        app: ClientApp,
        node_id: int,
        node_config: Mapping[str, UserConfigValue],
        prepare: Callable[[Message], None] = lambda _: None,
    ) -> None:
        self._app, self._node_id, self._node_config = app, node_id, dict(node_config)
        self._prepare = prepare
        self._context: Context | None = None

    def run_is(self, run_id: int, run_config: Mapping[str, UserConfigValue]) -> None:
        """The run that the next requests belong to; its context lasts as long as this process."""
        set_identity(run_id, self._node_id)
        if self._context is None or self._context.run_id != run_id:
            self._context = Context(run_id, self._node_id, self._node_config, RecordDict(), dict(run_config))

    def answer(self, header: bytes, parts: Iterable[bytes]) -> Body:
        """The app's reply; what it raises stays in this device's log, but for the name of its type.

        Raises:
            ValueError: the request is no message, or not this device's.
        """
        try:
            message = join_message(header, parts)
        except (OSError, MemoryError) as error:
            _log.error("cannot read a request: %s", error)
            return Body(error_header("the device could not read the request; its log says more"), ())
        context = self._context
        if context is None or (message.metadata.dst_node_id, message.metadata.run_id) != (
            self._node_id,
            context.run_id,
        ):
            raise ValueError("the request is for another device or run")
        try:
            self._prepare(message)
            return _body_of(self._app(message, context))
        except BaseException as error:  # the user's own code, and it may call sys.exit
            _log.exception("the app failed")
            return Body(error_header(f"the app raised {type(error).__name__}; the device's log says more"), ())


def _body_of(reply: Message) -> Body:
    """An app's reply as it travels."""
    if not isinstance(reply, Message):
        raise TypeError(f"the app answered {type(reply).__name__}, not a Message")
    set_message_id(reply, os.urandom(16).hex())
    content = part_content(reply.content) if reply.has_content() else None
    header = part_metadata(reply) + (content.header if content else b"")
    if len(header) > LARGEST_HEADER:
        raise ValueError(f"the reply has {len(header)} bytes besides its arrays, the link takes {LARGEST_HEADER}")
    return Body(header, content.parts if content else ())


class Worker:
    """One thread that does one thing after another, so that the stream's own thread is always there to answer.

    It does not keep the process alive: Python cannot end a thread, and the app may be in the middle of training.

    Attributes:
        is_busy: whether it is at work.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.is_busy = False
        threading.Thread(target=self._work, name=APP_THREAD, daemon=True).start()

    def submit(self, task: Callable[[], None]) -> None:
        """Do this after what was submitted before."""
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            self.is_busy = True
            try:
                task()
            except BaseException:  # a bug of ours: one task is lost, and not the device
                _log.exception("a task failed")
            self.is_busy = False

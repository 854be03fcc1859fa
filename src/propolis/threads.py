"""Calls that may take long, or for ever, beside an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(call: Callable[[], T], name: str) -> T:
    """The result of a call in a thread of its own, which is left behind where the loop or the process ends first."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(set_it: Callable[[asyncio.Future[T]], None]) -> None:
        if not done.done():
            set_it(done)

    def work() -> None:
        try:
            result = call()
        except Exception as error:
            failure = error  # the name of an except clause is gone after it
            told = lambda future: future.set_exception(failure)  # noqa: E731
        else:
            told = lambda future: future.set_result(result)  # noqa: E731
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(tell, told)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await done

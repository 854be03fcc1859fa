"""Inference beside the link: models of the registry, answered in a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from propolis.link.address import Address
from propolis.link.certificates import DeviceName, Tls
from propolis.secure.errors import PropolisError, UsageError
from propolis.server.config import NOWHERE, ServerConfig
from propolis.server.membership import Membership
from propolis.server.opening import open_registry

_LOOK_S, _START_S, _END_S = 10.0, 60.0, 60.0
_log = logging.getLogger("propolis.server")


@contextmanager
def inference(config: ServerConfig, tls: Tls, membership: Membership) -> Iterator[int]:
    """Answer with the models of the registry that the configuration names, while the context lasts.

    A model that has no version to serve yet is served as soon as it has one. Where the address is not this machine's
    own, the connection is encrypted as the link's is, and callers are the federation's devices.

    Args:
        config: what to serve, and where.
        tls: the server's certificate and key.
        membership: who is answered from elsewhere.

    Yields:
        The port; 0 where there is nothing to serve.

    Raises:
        UsageError: on entering: there is no registry, or an address cannot be used.
    """
    if not config.serve:
        yield 0
        return
    if config.registry is None:
        raise UsageError("serve: say in which registry, with --registry")
    begun, end = Future[int](), Future[None]()
    thread = threading.Thread(
        target=_work, args=(config, tls, membership, begun, end), name="propolis-inference", daemon=True
    )
    thread.start()
    try:
        yield begun.result(_START_S)
    finally:
        end.set_result(None)
        thread.join(_END_S)


def _work(config: ServerConfig, tls: Tls, membership: Membership, begun: Future[int], end: Future[None]) -> None:
    try:
        asyncio.run(_serve(config, tls, membership, begun, end))
    except BaseException as error:
        if begun.done():
            _log.exception("inference has failed; the link goes on")
        else:
            begun.set_exception(error)


async def _serve(config: ServerConfig, tls: Tls, membership: Membership, begun: Future[int], end: Future[None]) -> None:
    from propolis.server.serve import RegistryModels, Wanted
    from propolis.serving.faults import Fault, InferenceError
    from propolis.serving.refresh import Refresh
    from propolis.serving.server import ServingOptions, is_loopback, serving

    wanted = [Wanted.parse(text) for text in config.serve]
    models = RegistryModels(open_registry(str(config.registry)), wanted)
    listen = Address.parse(config.serve_listen)
    metrics = None if config.serve_metrics == NOWHERE else Address.parse(config.serve_metrics)
    is_open = not is_loopback(listen)
    options = ServingOptions(listen, metrics, require_certificate=is_open)
    found = []
    try:
        for model in models.newer():
            found.append(model)  # noqa: PERF402  # those before one that fails are kept
    except PropolisError as error:
        _log.warning("not served yet: %s", error)

    def admit(certificate: bytes) -> None:
        try:
            membership.require(DeviceName.of(certificate))
        except UsageError as error:  # of ours: a file cannot be read, for now
            _log.error("cannot look up a device: %s", error)
            raise InferenceError(Fault.STOPPING, "the server cannot look up its members at the moment") from None

    refresh = Refresh(models.newer, _LOOK_S)
    async with serving(found, options, tls if is_open else None, refresh, admit if is_open else None) as server:
        begun.set_result(server.port)
        await asyncio.wrap_future(end)

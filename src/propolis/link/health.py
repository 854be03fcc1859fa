"""gRPC's health checks, as all servers here answer them."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health


class Health(health.aio.HealthServicer):  # type: ignore[misc]
    """One check at a time: whoever can connect could watch with many streams for ever."""

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Not offered."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "use Check")

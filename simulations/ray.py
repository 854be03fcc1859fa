"""Flower's own simulation engine on Ray, driven with the same apps."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from propolis.secure.errors import PropolisError, UsageError
from propolis.settings import Settings


def require_ray(settings: Settings) -> None:
    """Find out before a run whether Ray can run its devices.

    Raises:
        UsageError: Ray is not installed, or a device is to have more CPUs than this machine has.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("the backend ray needs Ray: pip install 'propolis[sim]'")
    cpus = os.cpu_count() or 1
    if "RAY_ADDRESS" not in os.environ and settings.ray_cpus > cpus:
        raise UsageError(f"ray_cpus: a device cannot have {settings.ray_cpus:g} of this machine's {cpus} CPUs")


def run_on_ray(
    settings: Settings, client: ClientApp, serve: Callable[[Grid], None], cancelled: threading.Event
) -> None:
    """Run `serve` against Flower's simulation engine on as many actors as ``ray_cpus`` leaves room for.

    Args:
        settings: of the devices.
        client: what the devices run.
        serve: the server's whole work on the grid; what it raises is raised here.
        cancelled: set here when the engine has ended, so that `serve` stops waiting for devices.

    Raises:
        PropolisError: the engine failed.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's new default; unset, it warns
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    try:
        run_simulation(
            server_app,
            client,
            settings.clients,
            backend_config={
                "client_resources": {"num_cpus": settings.ray_cpus, "num_gpus": 0.0},
                "init_args": {"log_to_driver": False},
            },
        )
    except RuntimeError as error:
        raise PropolisError(f"Flower's simulation engine failed: {error}") from None
    finally:
        cancelled.set()  # whatever ended the engine, nobody is left to wait for

"""Many devices in one process, each with a certificate and a connection of its own: ``python -m`` this module.

Arguments: the federation's folder, the first device's index, the one after the last, and the server's address. The
devices connect when a line comes on standard input, and leave when the run is over.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from propolis.client.agent import Agent, AgentOptions
from propolis.client.runner import AppRunner, Worker
from propolis.flower import quiet_flower
from propolis.link.certificates import DeviceName, load_tls
from propolis.link.spool import Spools
from propolis.simulations.bench.echo_app import client_app
from propolis.simulations.federation import device_folder

READY = "ready"


async def attend(folder: Path, indices: range, address: str) -> None:
    """Run the devices until the run is over; they share a thread for the app.

    Raises:
        RefusedByServerError: one was not taken.
    """
    worker, spools, agents = Worker(), Spools(), []
    options = AgentOptions(address, once=True)
    for index in indices:
        tls = load_tls(device_folder(folder, index))
        runner = AppRunner(client_app, DeviceName.of(tls.certificate).node_id, {})
        agents.append(Agent(options, tls, runner, worker, spools))
    print(READY, file=sys.stderr, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await asyncio.gather(*(agent.run() for agent in agents))


if __name__ == "__main__":
    quiet_flower()
    folder, first, end, address = sys.argv[1:]
    asyncio.run(attend(Path(folder), range(int(first), int(end)), address))

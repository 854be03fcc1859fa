"""The ready ClientApp of one real device: a task, and the examples that never leave it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from propolis.client.app import Participant, hold_out, make_client_app
from propolis.client.train import LocalTrainer, derive_seed
from propolis.client.update import secure_mod
from propolis.task import choose_device, load_task


def ready_app(task: str, data: Path, device: str = "auto", threads: int = 1) -> ClientApp:
    """The app of a device with its own examples; they are read now, so that what is wrong with them shows now.

    Args:
        task: built-in, or MODULE:CLASS installed on the device; it must be the one that the server trains.
        data: what the task's `device_data` reads.
        device: that trains.
        threads: of torch; small models are slower on more, and results depend on how many there are. 0: as torch likes.

    Raises:
        UsageError: the task, its data or the device cannot be used.
    """
    if threads:
        torch.set_num_threads(threads)
    loaded = load_task(task)
    examples = loaded.device_data(data)
    trainer = LocalTrainer(loaded, choose_device(device))

    @lru_cache(maxsize=1)
    def participant(share: float, seed: int, name: str) -> Participant:
        train, held_out = hold_out(examples, share, derive_seed("holdout", seed, name))
        return Participant(trainer, train, held_out, name)

    def participant_of(context: Context) -> Participant:
        told = context.run_config
        share = float(told.get("holdout", 0.0)) if told.get("evaluate-fraction") else 0.0
        return participant(share, int(told.get("seed", 0)), str(context.node_id))

    return make_client_app(participant_of, [secure_mod])

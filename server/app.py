"""The ready ServerApp over a `Task`: it drives the strategy round by round, evaluates, checkpoints and resumes."""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from propolis.secure.codec.profiles import PROFILES, Profile
from propolis.secure.errors import CancelledError, TooFewPeersError, UsageError
from propolis.secure.he.keys import PublicKey
from propolis.secure.identity import TrustedRoster
from propolis.server.checkpoint import RoundRecord, RunState, save_checkpoint
from propolis.server.encryption import Encryption
from propolis.server.exchange import MeteredGrid
from propolis.server.grid import SecureGrid
from propolis.server.he_grid import HeGrid
from propolis.server.masked_round import Masking
from propolis.server.model import GlobalModel
from propolis.server.planner import Protection
from propolis.server.protected_grid import ProtectedGrid
from propolis.server.prune import Pruning
from propolis.server.renewal import Renewal
from propolis.server.round import Round, Trained
from propolis.server.strategy import go_on_from, make_strategy, restore_strategy, strategy_state
from propolis.settings import FEWEST_IN_A_SUM, Settings
from propolis.task import Examples, Task

# The settings that travel to the devices with every train message, see `propolis.client.train.TrainConfig`.
_TRAINING_KEYS = (
    *("optimizer", "epochs", "steps", "batch_size", "momentum", "weight_decay", "clip_norm"),
    *("lr", "lr_schedule", "lr_decay", "rounds", "seed"),
)
_NODE_POLL_S = 0.2

# Settings that leave the rounds of a run as they would have been.
MAY_CHANGE_ON_RESUME = frozenset({"rounds", "workers", "round_deadline", "attempts"})


@dataclass(frozen=True, slots=True)
class Members:
    """Who may take part in a protected run.

    Attributes:
        roster: the federation's devices, verified.
        max_weight: largest number of examples that one of them may have; public.
        newest: the roster as it is now, where it may change during the run.
        journal: see `SecureGrid`.
        he_key: public part of the federation's key of homomorphic encryption, where it has one.
        newest_key: that key as it is now, where it may change during the run; raises UsageError while there is none
            that rounds may be under.
        seed: of the codec's public randomness, for a run that can be repeated; None: new every round.
    """

    roster: TrustedRoster
    max_weight: float
    seed: int | None = None
    newest: Callable[[], TrustedRoster] | None = None
    journal: Path | None = None
    he_key: PublicKey | None = None
    newest_key: Callable[[], PublicKey] | None = None


class Observer(Protocol):
    """Who wants to know how a run goes."""

    def round_started(self, number: int, attempt: int) -> None:
        """An attempt at a round begins."""

    def round_finished(self, state: RunState) -> None:
        """A round is done, and saved where a checkpoint was asked for."""


def initial_model(settings: Settings, task: Task) -> GlobalModel:
    """The global model before the first round; the same for the same seed."""
    torch.manual_seed(settings.seed)
    return GlobalModel.of(task.model())


def run_digest(settings: Settings) -> str:
    """What makes a run the one it is: a digest of the settings that decide its rounds."""
    decisive = settings.model_dump(exclude=set(MAY_CHANGE_ON_RESUME))
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def protection_of(settings: Settings, max_weight: float, seed: int | None = None) -> Protection:
    """How the settings ask for a run's sums to be protected; the run itself tries again, with other devices."""
    return Protection(
        max_weight=settings.max_weight or max_weight,
        codec=profile_of(settings),
        range=settings.update_range,
        min_clients=settings.min_clients,
        malicious=settings.malicious,
        corrupted=settings.assume_corrupted,
        dropped=settings.assume_dropped,
        attempts=1,
        seed=seed,
    )


def masking_of(settings: Settings) -> Masking:
    """How the settings ask for encrypted updates to be masked."""
    return Masking(settings.malicious, settings.assume_corrupted, settings.assume_dropped)


def profile_of(settings: Settings) -> Profile:
    """The codec that the settings name, with what they change of it."""
    changes: dict[str, Any] = {
        "width": settings.bits,
        "density": settings.density,
        "keep": settings.keep,
        "clip": settings.update_clip,
        "wraps": settings.wraps,
        "broadcast": settings.broadcast_step,
    }
    return replace(PROFILES[settings.codec], **{name: value for name, value in changes.items() if value is not None})


class FederatedRun:
    """A whole run of a task's training over a grid.

    Args:
        settings: what to do.
        task: the model and its evaluation.
        test: the server's test set.
        device: that evaluates.
        members: of the federation, where the settings ask for protection.
        start: where to go on; the state before the first round when absent.
        checkpoint: file that is replaced after each round.
        cancelled: set by somebody else to end the run at the next exchange.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        test: Examples,
        *,
        device: torch.device,
        members: Members | None = None,
        start: RunState | None = None,
        checkpoint: Path | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._settings, self._task, self._test = settings, task, test
        if settings.is_protected and members is None:
            raise UsageError(f"protection {settings.protection} needs a federation: who its members are")
        self._members = members
        self._cancelled = cancelled or threading.Event()
        newest, newest_key = (members.newest, members.newest_key) if members else (None, None)
        self._renewal = Renewal(newest, newest_key, settings.round_deadline, self._cancelled)
        self._checkpoint = checkpoint
        self.retries: list[str] = []
        self._observers: tuple[Observer, ...] = ()
        self._strategy = make_strategy(settings)
        self.state = start or RunState(initial_model(settings, task), (), {})
        restore_strategy(self._strategy, self.state.strategy)
        self._evaluated = task.model().to(device)
        self._pruning = Pruning.of(settings, self._evaluated)

    def run(self, grid: Grid, *observers: Observer) -> RunState:
        """Do the rounds that are left, tell the observers of each, and return the final state.

        Raises:
            TooFewPeersError: not enough devices, in every attempt at a round.
            StorageError: the checkpoint could not be written.
            CancelledError: the run was asked to stop.
        """
        self._observers = observers
        metered = MeteredGrid(grid, self._cancelled)
        talking = self._protected(metered)
        for number in range(self.state.completed + 1, self._settings.rounds + 1):
            self.state = self._round(metered, talking, number)
            if self._checkpoint is not None:
                save_checkpoint(self._checkpoint, self.state, run_digest(self._settings))
            for observer in observers:
                observer.round_finished(self.state)
        return self.state

    def evaluate(self, model: GlobalModel) -> dict[str, float]:
        """The task's metrics of `model` on the server's test set."""
        self._evaluated.load_state_dict({name: torch.from_numpy(array) for name, array in model.arrays.items()})
        with torch.no_grad():
            return {k: float(v) for k, v in self._task.evaluate(self._evaluated.eval(), self._test).items()}

    def _protected(self, grid: MeteredGrid) -> Grid:
        """The grid that the strategy talks to: this one, or a protected one around it."""
        if self._members is None or not self._settings.is_protected:
            return grid
        model = self.state.model
        secure = (
            self._encrypted(grid, self._members) if self._settings.is_encrypted else self._summed(grid, self._members)
        )
        if self.state.history:
            secure.resume_from(self.state.history[-1].metrics, self.state.grid)
        else:
            self.state = replace(self.state, model=replace(model, arrays=secure.adopted(dict(model.arrays))))
        return secure

    def _summed(self, grid: MeteredGrid, members: Members) -> ProtectedGrid:
        model = self.state.model
        return SecureGrid(
            grid,
            self._strategy,
            members.roster,
            protection_of(self._settings, members.max_weight, members.seed),
            exact=model.buffers,
            frozen=model.frozen,
            journal=members.journal,
            cancelled=self._cancelled,
        )

    def _encrypted(self, grid: MeteredGrid, members: Members) -> ProtectedGrid:
        if members.he_key is None:
            raise UsageError("protection he needs a key of homomorphic encryption: its holder makes it")
        model, settings = self.state.model, self._settings
        encryption = Encryption(
            members.he_key,
            settings.max_weight or members.max_weight,
            range=settings.update_range,
            min_clients=max(settings.min_clients, FEWEST_IN_A_SUM),  # or devices would not open the sum
            attempts=1,
            masking=masking_of(settings) if settings.is_masked else None,
        )
        return HeGrid(
            grid,
            self._strategy,
            members.roster,
            encryption,
            exact=model.buffers,
            frozen=model.frozen,
            journal=members.journal,
            cancelled=self._cancelled,
        )

    def _round(self, metered: MeteredGrid, grid: Grid, number: int) -> RunState:
        began = time.perf_counter()
        uplink, downlink = metered.uplink_bytes, metered.downlink_bytes
        trained, attempts, attempt_round = self._train(grid, number)
        model = self._pruned(number, trained.model)
        evaluates = self._settings.evaluate_fraction and self._renewal.is_good(grid)
        device_metrics = attempt_round.evaluate(model) if evaluates else {}
        # Under encryption the model here is the one that the run began with: the devices evaluate what they open.
        central = {} if self._settings.is_encrypted else self.evaluate(model)
        metrics = {**trained.metrics, **central, **{f"device-{k}": v for k, v in device_metrics.items()}}
        if self._pruning is not None:
            metrics["sparsity"] = self._pruning.sparsity(model)
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON knows no NaN
        record = RoundRecord(
            round=number,
            accuracy=metrics.pop("accuracy", None),
            loss=metrics.pop("loss", None),
            uplink_bytes=metered.uplink_bytes - uplink,
            downlink_bytes=metered.downlink_bytes - downlink,
            survivors=trained.survivors,
            dropped=trained.dropped,
            seconds=time.perf_counter() - began,
            attempts=attempts,
            failures=list(trained.failures),
            metrics=metrics,
            retries=list(self.retries),
        )
        history = (*self.state.history, record)
        return RunState(
            model,
            history,
            strategy_state(self._strategy),
            grid.state() if isinstance(grid, ProtectedGrid) else {},
        )

    def _pruned(self, number: int, model: GlobalModel) -> GlobalModel:
        if self._pruning is None:
            return model
        model = self._pruning.apply(number, self.state.model, model)
        go_on_from(self._strategy, model)
        return model

    def _train(self, grid: Grid, number: int) -> tuple[Trained, int, Round]:
        """Train a round, trying again with another sample when too few devices survive."""
        self.retries = []
        for attempt in range(self._settings.attempts):
            for observer in self._observers:
                observer.round_started(number, attempt)
            self._renewal.renew(grid)
            attempt_round = Round(
                grid=grid,
                strategy=self._strategy,
                number=number,
                attempt=attempt,
                seed=self._settings.seed,
                deadline=self._settings.round_deadline,
                min_clients=self._settings.min_clients,
                node_ids=self._with_room(grid, self._wait_for_devices(grid), f"{number}/{attempt}"),
            )
            try:
                return attempt_round.train(self.state.model, self._train_config(number)), attempt + 1, attempt_round
            except TooFewPeersError as error:
                self.retries.append(str(error))
        raise TooFewPeersError(f"{self.retries[-1]} (tried {self._settings.attempts} times)")

    def _with_room(self, grid: Grid, node_ids: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The devices to sample from: some of them, where the sample would be larger than a key has room for."""
        room = grid.room if isinstance(grid, HeGrid) else len(node_ids)
        if max(int(len(node_ids) * self._settings.fraction), self._settings.min_clients) <= room:
            return node_ids
        return tuple(random.Random(f"room/{self._settings.seed}/{name}").sample(node_ids, room))  # noqa: S311

    def _wait_for_devices(self, grid: Grid) -> tuple[int, ...]:
        deadline = time.monotonic() + self._settings.round_deadline
        while len(node_ids := tuple(grid.get_node_ids())) < self._settings.min_clients:
            if self._cancelled.is_set():
                raise CancelledError("the run was asked to stop")
            if time.monotonic() >= deadline:
                raise TooFewPeersError(
                    f"{len(node_ids)} devices connected within {self._settings.round_deadline:g} s, "
                    f"{self._settings.min_clients} are needed"
                )
            time.sleep(_NODE_POLL_S)
        return node_ids

    def _train_config(self, number: int) -> ConfigRecord:
        values = {key: getattr(self._settings, key) for key in _TRAINING_KEYS}
        if self._pruning is not None:
            values["pruned"] = self._pruning.has_begun(number)
        return ConfigRecord({k.replace("_", "-"): v for k, v in values.items() if v is not None})

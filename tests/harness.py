"""What several tests share: a small task with every kind of state, and the form of an error for people."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from propolis.task import DataSet, Examples, Task


class Blobs(Task):
    """Two classes in four dimensions; the model has trainable and frozen parameters, statistics and counters."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        model[0].bias.requires_grad_(False)
        return model

    def data(self) -> DataSet:
        return DataSet(self._examples(240, seed=1), self._examples(80, seed=2))

    def _examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, count)
        inputs = rng.normal(size=(count, 4)) + labels[:, None]
        users = np.array([f"user-{i % 12}" for i in range(count)])
        return Examples(torch.from_numpy(inputs).float(), torch.from_numpy(labels), users)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """The single line that a user's mistake gets, after checking that it is one."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("propolis: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.strip()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Fail where it does not come to pass in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _counting_app() -> ClientApp:
    """Answers with the calls a device has had, its partition and its process; does mischief when asked to."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        if config["what"] == "raise":
            raise ValueError("asked to")
        if config["what"] == "die":
            os._exit(9)
        if config["what"] == "hang":
            time.sleep(600)
        config["what"] = "changed"
        calls = context.state.metric_records.setdefault("calls", MetricRecord({"n": 0}))
        calls["n"] = int(calls["n"]) + 1  # type: ignore[arg-type]
        metrics = MetricRecord(
            {
                "calls": calls["n"],
                "partition": int(context.node_config["partition-id"]),
                "partitions": int(context.node_config["num-partitions"]),
                "pid": os.getpid(),
            }
        )
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


COUNTING_APP = _counting_app

"""The peer of ``propolis bench simulate``: the same job as a plain Flower app, in the manner of Flower's tutorial.

Run as ``python -m propolis.simulations.bench.flower_app CLIENTS ROUNDS``; prints the final test accuracy. Nothing
of it is Propolis but the partition, so that every device has the same examples in both.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from propolis.simulations.partition import Partition
from propolis.simulations.tasks.digits import Digits
from propolis.task import Examples

_EPOCHS, _BATCH_SIZE, _LR = 5, 32, 0.1


def _dataset(examples: Examples) -> TensorDataset:
    return TensorDataset(examples.inputs[:], examples.labels)


@lru_cache(maxsize=1)
def _partitions(clients: int) -> list[Subset[tuple[torch.Tensor, ...]]]:
    train = Digits().data().train
    parts = Partition.parse("dirichlet:0.5").split(train, clients, seed=0)
    return [Subset(_dataset(train), part.tolist()) for part in parts]


def _client_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = Digits().model()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        dataset = _partitions(int(context.node_config["num-partitions"]))[int(context.node_config["partition-id"])]
        optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
        criterion = nn.CrossEntropyLoss()
        model.train()
        for _ in range(_EPOCHS):
            for inputs, labels in DataLoader(dataset, batch_size=_BATCH_SIZE, shuffle=True):
                optimizer.zero_grad()
                loss = criterion(model(inputs), labels)
                loss.backward()
                optimizer.step()
        metrics = MetricRecord({"train-loss": float(loss), "num-examples": len(dataset)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def _server_app(rounds: int) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        model = Digits().model()
        test = Digits().data().test

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            model.load_state_dict(arrays.to_torch_state_dict())
            with torch.no_grad():
                correct = (model(test.inputs[:]).argmax(dim=1) == test.labels).float().mean()
            return MetricRecord({"accuracy": float(correct)})

        strategy = FedAvg(fraction_evaluate=0.0)
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=rounds, evaluate_fn=evaluate
        )
        if len(result.train_metrics_clientapp) != rounds:
            raise RuntimeError("devices failed to train: this is no measurement")
        print(result.evaluate_metrics_serverapp[rounds]["accuracy"])

    return app


def main(clients: int, rounds: int) -> None:
    """Run it on Flower's simulation engine, with the engine's own defaults."""
    from flwr.simulation import run_simulation

    run_simulation(_server_app(rounds), _client_app(), clients)


if __name__ == "__main__":
    os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from propolis.simulations.bench import flower_app  # Ray's processes know it by this name, not as __main__

    flower_app.main(int(sys.argv[1]), int(sys.argv[2]))

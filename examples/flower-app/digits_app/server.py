"""The server: FedAvg over whoever is there."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from propolis import Protection, SecureGrid, load_roster

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A few rounds; the metrics of the last one go to a file."""
    config = context.run_config
    nodes = int(config["min-nodes"])
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    protection = Protection(max_weight=2000, min_clients=nodes)
    grid = SecureGrid(grid, strategy, load_roster(Path(str(config["federation"]))), protection)  # secure, line 2
    start = ArrayRecord({"weights": Array(np.zeros((64, 10), np.float32))})
    result = strategy.start(grid, start, num_rounds=int(config["rounds"]))
    if config["out"]:
        last = int(config["rounds"])
        figures = {
            "train": dict(result.train_metrics_clientapp[last]),
            "evaluate": dict(result.evaluate_metrics_clientapp[last]),
        }
        Path(str(config["out"])).write_text(json.dumps(figures))

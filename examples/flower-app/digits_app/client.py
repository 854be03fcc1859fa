"""The device: softmax regression on its own handwritten digits, with numpy."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits

from propolis import secure_mod

app = ClientApp(mods=[secure_mod])  # secure, line 1: nothing leaves the device but masked sums


@app.train()
def train(message: Message, context: Context) -> Message:
    """Ten steps of gradient descent."""
    weights = message.content["arrays"]["weights"].numpy()
    inputs, labels = own_digits(context)
    for _ in range(10):
        scores = np.exp(inputs @ weights)
        gradient = inputs.T @ (scores / scores.sum(axis=1, keepdims=True) - np.eye(10)[labels]) / len(inputs)
        weights = (weights - gradient).astype(np.float32)
    metrics = MetricRecord({"num-examples": len(inputs), "accuracy": accuracy(weights, inputs, labels)})
    return Message(
        RecordDict({"arrays": ArrayRecord({"weights": Array(weights)}), "metrics": metrics}), reply_to=message
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The accuracy of the global model here."""
    inputs, labels = own_digits(context)
    metrics = {
        "num-examples": len(inputs),
        "accuracy": accuracy(message.content["arrays"]["weights"].numpy(), inputs, labels),
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def own_digits(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """This device's share of the data: (n, 64) in [0, 1], and (n,) labels."""
    inputs, labels = load_digits(return_X_y=True)
    device, devices = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    return inputs[device::devices] / 16, labels[device::devices]


def accuracy(weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The share of right answers."""
    return float(((inputs @ weights).argmax(axis=1) == labels).mean())

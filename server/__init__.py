"""The cloud aggregator's end: rounds, checkpoints and the ready Flower ServerApp."""

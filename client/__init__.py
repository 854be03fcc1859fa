"""The device's end: local training and the ready Flower ClientApp."""

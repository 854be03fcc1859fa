"""What both ends must agree on: no I/O, no Flower, no clock."""

"""A plain Flower app, made secure by two lines."""

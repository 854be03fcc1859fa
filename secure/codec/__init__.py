"""Updates as vectors that can be added up: what commutes with the modular sum."""

"""Many devices on one machine: grids, data, partitions, reports and benchmarks."""

"""Side-by-side benchmarks: each compares ratios within one run, because machines are shared and noisy."""

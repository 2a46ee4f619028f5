"""Experiments and benchmarks: `python -m experiments.NAME`."""

"""Comparisons of runs: planned, run, resumed and read."""

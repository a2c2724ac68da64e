"""Studies: comparisons of systems, run by `python -m experiments NAME`."""

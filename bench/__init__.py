"""Benchmarks: each a script that prints a table and writes JSON. Ratios against a peer or a limit in the same run."""

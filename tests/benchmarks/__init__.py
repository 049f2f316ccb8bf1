"""Benchmarks: ``python -m tests.benchmarks``, or ``make bench``. They rewrite the tables of docs/cost.md."""

"""Benchmarks. Each module is a command: `python -m bench.<name>`, or `posenc bench <name>`.

In a wheel this package is `posenc.bench`: its modules import one another relatively.
"""

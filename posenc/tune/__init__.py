"""Measures the machine for `auto`: `python -m posenc.tune`, see `posenc.tune.__main__`."""

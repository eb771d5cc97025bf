"""Measures the machine for `auto`: `posenc tune`, see `posenc.tune.__main__`."""

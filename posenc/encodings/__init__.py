"""Positional encodings, one file each; `base` is the seam they fill."""

from posenc.encodings.base import Encoding
from posenc.encodings.carope import CARoPE
from posenc.encodings.learned import Learned
from posenc.encodings.nope import NoPE
from posenc.encodings.path import PaTH
from posenc.encodings.polar import Polar
from posenc.encodings.relative import Relative
from posenc.encodings.rope import RoPE, half_to_interleaved, interleaved_to_half
from posenc.encodings.sinusoidal import Sinusoidal

__all__ = [
    "CARoPE",
    "Encoding",
    "Learned",
    "NoPE",
    "PaTH",
    "Polar",
    "Relative",
    "RoPE",
    "Sinusoidal",
    "half_to_interleaved",
    "interleaved_to_half",
]

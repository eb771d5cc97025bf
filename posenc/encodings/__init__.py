"""Positional encodings, one file each; `base` is the seam they fill."""

from posenc.encodings.alibi import ALiBi
from posenc.encodings.base import Encoding
from posenc.encodings.carope import CARoPE
from posenc.encodings.cope import CoPE
from posenc.encodings.fire import FIRE
from posenc.encodings.fope import FoPE
from posenc.encodings.fox import FoX
from posenc.encodings.grape import GRAPE
from posenc.encodings.kerple import Kerple
from posenc.encodings.learned import Learned
from posenc.encodings.nope import NoPE
from posenc.encodings.path import PaTH
from posenc.encodings.polar import Polar
from posenc.encodings.pope import PoPE
from posenc.encodings.relative import Relative
from posenc.encodings.rope import RoPE, half_to_interleaved, interleaved_to_half
from posenc.encodings.selective import SelectiveRoPE
from posenc.encodings.sinusoidal import Sinusoidal
from posenc.encodings.t5 import T5
from posenc.encodings.xpos import XPos

__all__ = [
    "FoX",
    "FIRE",
    "Kerple",
    "T5",
    "ALiBi",
    "GRAPE",
    "CARoPE",
    "CoPE",
    "Encoding",
    "FoPE",
    "Learned",
    "NoPE",
    "PaTH",
    "PoPE",
    "Polar",
    "Relative",
    "RoPE",
    "SelectiveRoPE",
    "Sinusoidal",
    "XPos",
    "half_to_interleaved",
    "interleaved_to_half",
]

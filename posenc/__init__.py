"""posenc: position in attention, every scheme interchangeable."""

from posenc.attention import Attention
from posenc.cache import Cache
from posenc.convolution import DepthwiseConv
from posenc.cost import attention_cost, model_cost
from posenc.encodings import (
    FIRE,
    GRAPE,
    T5,
    ALiBi,
    CARoPE,
    CoPE,
    Encoding,
    FoPE,
    FoX,
    Kerple,
    Learned,
    NoPE,
    PaTH,
    Polar,
    PoPE,
    Relative,
    RoPE,
    SelectiveRoPE,
    Sinusoidal,
    XPos,
)
from posenc.models.config import GPTConfig
from posenc.models.convert import convert
from posenc.models.gpt import GPT
from posenc.placement import segments
from posenc.routing.moh import MoH
from posenc.routing.stats import record_routing
from posenc.zoo import attention, names

__version__ = "0.2.0"

# `attention` is the function; the module of that name is reached as posenc.attention only by its
# import statement.
__all__ = [
    "FIRE",
    "GPT",
    "T5",
    "ALiBi",
    "GRAPE",
    "Attention",
    "Cache",
    "CARoPE",
    "CoPE",
    "DepthwiseConv",
    "Encoding",
    "FoX",
    "FoPE",
    "GPTConfig",
    "Kerple",
    "Learned",
    "MoH",
    "NoPE",
    "PaTH",
    "PoPE",
    "Polar",
    "Relative",
    "RoPE",
    "SelectiveRoPE",
    "Sinusoidal",
    "XPos",
    "attention",
    "attention_cost",
    "convert",
    "model_cost",
    "names",
    "record_routing",
    "segments",
]

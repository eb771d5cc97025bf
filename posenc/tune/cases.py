"""What is measured: cases of the modules of the zoo, by sizes, direction and dtype."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import posenc
from posenc.attention import Attention, Shared
from posenc.backends.case import Case
from posenc.backends.measured import ROTATIONS

#: Heads of every case.
HEADS = 8
#: Noise of an encoding's weights: at its start many a term is 0, and a way that forgot it right.
NOISE = 0.1


class Work(NamedTuple):
    """A name of the zoo, and what is asked of it.

    Attributes:
        options: of `posenc.attention`, for a length.
        call: "documents" or "padding" of its calls.
    """

    name: str
    options: Callable[[int], dict[str, Any]] = lambda length: {}
    call: str = ""


def some(**options: Any) -> Callable[[int], dict[str, Any]]:
    """The same options for every length."""
    return lambda length: options


WORKS = (
    Work("nope"),
    Work("nope", some(num_kv_heads=HEADS // 4)),
    Work("nope", lambda length: {"window": max(1, length // 4)}),
    Work("nope", call="documents"),
    Work("nope", call="padding"),
    Work("alibi"),
    Work("t5"),
    Work("fire"),
    Work("fox"),
    Work("rmha"),
    Work("rcmha"),
    Work("pope"),
    Work("cope"),
    Work("path"),
    Work("moh", some(encoding="nope", shared=HEADS // 4, top_k=HEADS // 4)),
    Work("moh", some(encoding="nope")),
    Work("rope"),
    Work("carope"),
    Work("cmha"),
)


class Sizes(NamedTuple):
    """Of a case: B, T (the keys of a step), D."""

    batch: int
    length: int
    dim: int


class Asked(NamedTuple):
    """A case, and the leaves whose gradients a backward pass gives: none in inference."""

    case: Case
    leaves: tuple[Tensor, ...]


def ask(
    work: Work, sizes: Sizes, direction: str, dtype: torch.dtype, device: torch.device
) -> Asked | None:
    """Random inputs, the same at every call; None where the work has no such direction."""
    if direction == "step" and work.call == "documents":
        return None  # nothing is decoded after several documents
    batch, length, dim = sizes
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        options = work.options(length)
        module = posenc.attention(work.name, HEADS * dim, HEADS, **options)
        add_noise(module.encoding)
        module = module.to(device, dtype).eval()
        x = torch.randn(batch, length, HEADS * dim).to(device, dtype)
    with torch.set_grad_enabled(direction == "train"):
        call = _call(work, batch, length, device)
        case = _step(module, x, call) if direction == "step" else _text(module, x, call)
        if direction == "train":
            q, k, v = (z.detach().requires_grad_() for z in (case.q, case.k, case.v))
            case = case._replace(q=q, k=k, v=v)
        if type(case.rotation) not in ROTATIONS:
            case = case.turned()
    leaves: tuple[Tensor, ...] = ()
    if direction == "train":
        leaves = (q, k, v, *(weight for weight in module.parameters() if weight.requires_grad))
    return Asked(case, leaves)


@torch.no_grad()
def add_noise(encoding: nn.Module) -> None:
    """Move every weight, within the bounds that its module keeps it in."""
    for weight in encoding.parameters():
        weight.add_(NOISE * torch.randn_like(weight))
    for part in encoding.modules():
        for name, (low, high) in getattr(part, "bounds", {}).items():
            getattr(part, name).clamp_(low, high)


def _call(work: Work, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    if work.call == "documents":
        part = max(1, length // 4)
        return {"segments": torch.arange(length, device=device).div(part, rounding_mode="floor")}
    if work.call == "padding":
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        real[0, : length // 8] = False
        return {"mask": real}
    return {}


def _text(module: Attention, x: Tensor, call: dict[str, Tensor]) -> Case:
    segments = call.get("segments")
    segments = None if segments is None else segments.expand(len(x), -1)
    where = module._place(x, None, call.get("mask"), segments, None)
    return module._case(x, Shared(where), None, "sdpa")[0]


def _step(module: Attention, x: Tensor, call: dict[str, Tensor]) -> Case:
    """The last token after all others."""
    cache = module.make_cache(len(x), x.shape[1])
    past = {key: value[:, :-1] for key, value in call.items()}
    if x.shape[1] > 1:
        module(x[:, :-1], cache=cache, **past)
    where = module._place(x[:, -1:], None, None, None, cache)
    return module._case(x[:, -1:], Shared(where), cache, "sdpa")[0]


class Plan(NamedTuple):
    """What is measured on a device.

    Attributes:
        tokens: of a batch in training; inference is that of one text.
        checked: the longest text that is compared with the definition in fp64.
        rounds, seconds: of the clock, for each candidate and for all.
        neighbours: how many other tiles of a kernel are tried.
    """

    lengths: tuple[int, ...]
    dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    tokens: int
    checked: int
    rounds: int
    seconds: float
    works: tuple[Work, ...] = WORKS
    directions: tuple[str, ...] = ("step", "forward", "train")
    neighbours: int = 8

    def cells(self) -> Iterator[tuple[Work, str, torch.dtype, int]]:
        """Work, direction, dtype and D: what is checked once, and timed at every length."""
        for dtype in self.dtypes:
            for dim in self.dims:
                for direction in self.directions:
                    for work in self.works:
                        yield work, direction, dtype, dim

    def sizes(self, direction: str, length: int, dim: int) -> Sizes:
        """Of what is timed."""
        batch = max(1, self.tokens // length) if direction == "train" else 1
        return Sizes(batch, length, dim)


def plan(device: torch.device, quick: bool) -> Plan:
    """Minutes of measurements, or with `quick` one length and head dim."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    if device.type == "cuda":
        if quick:
            return Plan((1024,), (64,), (brain,), 16384, 1091, 10, 0.2, neighbours=3)
        return Plan((128, 512, 2048, 8192), (64, 128), (brain, half, single), 16384, 1091, 10, 0.2)
    if quick:
        return Plan((512,), (64,), (single, brain), 512, 307, 3, 0.1)
    return Plan((128, 512, 2048), (64,), (single, brain), 2048, 1091, 5, 0.3)

"""What a call of our kernels launches, and what each launch asks of the machine by its code.

Kernels are caught before they reach a device and compiled for an H100 on any machine, as
`posenc.kernels.inspect_sm90` does; operations of torch around them are counted by their bytes and
products. Of a kernel that multiplies, the loops by their machine code:

    products and exp2     a turn for each tile of the other side; of two loops that differ by their
                          mask the shorter one where nothing is hidden
    products alone        the relative terms': a turn for each block of distances of a segment
    no products           CARoPE's way back in its epilogue: a turn for each of its tiles
    all other code        once for a tile

Of a kernel that does not multiply all code counts once; where it loops over its work, as those of
RoPE and of the convolution do, its bytes alone are right.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from posenc.errors import unknown
from posenc.kernels import (
    carope,
    carope_attention,
    conv,
    flash,
    inspect_sm90,
    polar,
    relative,
    rope,
    rope_attention,
    routed,
    sass,
)
from posenc.kernels.common import rows_by_head

from .h100 import (
    H100,
    NOTHING,
    Demand,
    Machine,
    Time,
    kernel_time,
    key_turns,
    operation_time,
    row_turns,
)

Shape = tuple[int, int, int, int]  # B, H, T, D
Call = Callable[[], object]
#: A forward call and a backward call.
Passes = tuple[Call, Call]


class Operation(NamedTuple):
    """Of torch."""

    bytes: float
    flops: float


#: Operations of torch that move nothing, besides views.
FREE = ("empty", "new_empty", "detach", "_unsafe_view")


class Counting(TorchDispatchMode):
    """Collects the operations inside that compute or copy something."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if not func.is_view and not packet.__name__.startswith(FREE):
            count = flop_registry.get(packet)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.found.append(Operation(tensor_bytes((args, kwargs, out)), flops))
        return out


def tensor_bytes(tree: Any) -> float:
    """Of all tensors in it, each once; an expanded one as far as it is held."""
    tensors = {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return float(sum(held(x) * x.element_size() for x in tensors.values()))


def held(x: Tensor) -> int:
    """Elements that are not repetitions."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size)


@contextmanager
def counting() -> Iterator[list[Any]]:
    """Operations of torch and launches inside, neither of which compute: inputs are on meta."""
    found: list[Any] = []
    with Counting(found), inspect_sm90.caught() as launches:
        yield found
    found += launches


class Code(NamedTuple):
    """A compiled kernel."""

    loops: tuple[sass.Use, ...]
    rest: sass.Use
    warps: int
    programs: int  # of a processor


@cache
def _code(cubin: bytes, warps: int, shared: int) -> Code:
    bodies, rest = sass.split(inspect_sm90.disassembled(cubin))
    registers, _ = inspect_sm90.resources(cubin)
    programs = inspect_sm90.programs(registers, warps, shared)
    return Code(tuple(map(sass.use, bodies)), sass.use(rest), warps, programs)


def code(launch: inspect_sm90.Launch) -> Code:
    """Compile a launch for an H100 and read it."""
    result = inspect_sm90.compiled(launch)
    meta = result.metadata
    return _code(result.asm["cubin"], meta.num_warps, meta.shared)


def demand(uses: Sequence[tuple[float, sass.Use]], warps: int, machine: Machine) -> Demand:
    """What a program of so many warps asks for that passes through code so many times."""

    def total(of: Callable[[sass.Use], float]) -> float:
        return warps * sum(times * of(use) for times, use in uses)

    cycles = machine.clock * machine.schedulers
    product = machine.product / machine.processors
    return Demand(
        issue=total(lambda use: use.instructions) / cycles,
        product=total(lambda use: use.wgmma + use.mma / machine.mma_share) / product,
        special=total(lambda use: 32 * use.special) / (machine.special * machine.clock),
        moved=total(lambda use: use.copied + use.moved),
    )


def products(use: sass.Use) -> float:
    """FLOPs of a warp."""
    return use.wgmma + use.mma


def passed(
    found: Code, launch: inspect_sm90.Launch, whole: int, masked: int
) -> list[tuple[float, sass.Use]]:
    """How often a tile with so many turns passes through each part of the code.

    Raises:
        ValueError: it has no loop with products and exp2, or one with products alone that does not
            go by segments of distances.
    """
    sizes = launch.kwargs
    # Copies ahead of a loop are those of its first turns; its last ones copy nothing.
    uses: list[tuple[float, sass.Use]] = [(1, found.rest._replace(copied=0))]
    main = sorted(use for use in found.loops if products(use) and use.special)
    if not main:
        raise ValueError(
            f"{launch.kernel.__name__} has no loop with products and exp2, by which its turns are "
            "counted. Say in bench/launches.py how its tiles go."
        )
    uses += [(whole, main[0]), (masked, main[-1])]
    terms = [use for use in found.loops if products(use) and not use.special]
    for size in sorted({products(use) for use in terms}):
        own = sorted(use for use in terms if products(use) == size)
        blocks, ends = distances(launch, whole + masked)
        # Loops over the ends of a segment's distances, where there are any, are the longer ones.
        ends = ends if len(own) > 1 else 0
        uses += [(blocks - ends, own[0]), (ends, own[-1])]
    if getattr(sizes.get("HOOK"), "__name__", "") == "store_turned_back":
        rows = sizes["BLOCK_N" if launch.kernel.__name__ == "dkv_kernel" else "BLOCK_M"]
        uses += [(rows / sizes["OPTIONS"][1], use) for use in found.loops if not products(use)]
    return uses


def distances(launch: inspect_sm90.Launch, turns: int) -> tuple[float, float]:
    """Blocks of distances that a tile with so many turns multiplies; those at segments' ends."""
    sizes, name = launch.kwargs, launch.kernel.__name__
    if not {"BLOCK", "SEGMENT"} <= sizes.keys():
        raise ValueError(
            f"{name} multiplies in a loop without exp2; expected BLOCK and SEGMENT among its "
            f"sizes, got {', '.join(sizes)}. Say in bench/launches.py how often the loop turns."
        )
    rows, keys, block = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK"]
    if name == "dkv_kernel":  # each block of rows has its distances
        return turns * (keys + rows) / block, turns * rows / block
    segments = math.ceil(turns * keys / sizes["SEGMENT"])
    return (turns * keys + segments * rows) / block, segments * rows / block


def launch_time(
    launch: inspect_sm90.Launch, shape: Shape, share: float = 1.0, machine: Machine = H100
) -> Time:
    """Of one launch for tensors of this shape.

    Args:
        share: of the rows of q that MoH keeps.

    Raises:
        ValueError: a kernel multiplies matrices whose tiles are not known here.
    """
    found, sizes, name = code(launch), launch.kwargs, launch.kernel.__name__
    batch, heads, length, _ = shape
    bytes_ = tensor_bytes((launch.args, sizes))
    if not any(map(products, found.loops)):
        once = [(1.0, use) for use in (found.rest, *found.loops)]
        piece = demand(once, found.warps, machine)
        return kernel_time([piece], math.prod(launch.grid), found.programs, bytes_, machine)
    if name in ("forward_kernel", "dq_kernel"):
        turns = row_turns(length, sizes["BLOCK_M"], sizes["BLOCK_N"], share)
    elif name == "dkv_kernel":
        turns = key_turns(length, sizes["BLOCK_N"], sizes["BLOCK_M"], share)
    else:
        known = ["forward_kernel", "dq_kernel", "dkv_kernel"]
        raise ValueError(unknown("kernel with products", name, known))
    pieces = [demand(passed(found, launch, *each), found.warps, machine) for each in turns]
    return kernel_time(pieces, batch * heads, found.programs, bytes_, machine)


def call_time(call: Call, shape: Shape, share: float = 1.0, machine: Machine = H100) -> Time:
    """All that a call on meta tensors does, one after another."""
    with counting() as found:
        call()
    total = NOTHING
    for each in found:
        if isinstance(each, Operation):
            total += operation_time(*each, machine)
        else:
            total += launch_time(each, shape, share, machine)
    return total


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without storage."""
    return torch.empty(size, dtype=dtype, device="meta")


def projections(shape: Shape) -> tuple[Tensor, ...]:
    """q, k and v in bf16, views of one packed projection."""
    batch, heads, length, dim = shape
    packed = meta(batch, length, 3, heads, dim, dtype=torch.bfloat16)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def plain(shape: Shape, deterministic: bool | None = None) -> Passes:
    """Causal attention without positions."""
    q, k, v = projections(shape)
    o, scale = rows_by_head(q), shape[-1] ** -0.5
    saved = flash.Saved(q, k, v, o, meta(*shape[:3]))
    return (
        partial(flash.forward, q, k, v, scale),
        partial(flash.backward, o, saved, scale, deterministic),
    )


def turns_of(shape: Shape) -> Tensor:
    """Of the frequencies of a head."""
    return meta(shape[-1] // 2, dtype=torch.int64)


def turned(shape: Shape) -> Passes:
    """RoPE alone; its frequencies as turns are made once for all layers."""
    q, k, _ = projections(shape)
    out, other = (meta(*shape, dtype=torch.bfloat16) for _ in range(2))
    turn = partial(rope.launch, q, k, out, other, turns_of(shape), None, 1.0, False)
    return partial(turn, False), partial(turn, True)


def turned_inside(shape: Shape) -> Passes:
    """RoPE within attention."""
    q, k, v = projections(shape)
    o, scale = rows_by_head(q), shape[-1] ** -0.5
    rotation = rope_attention.Rotation(turns_of(shape), None, 1.0, False)
    k_turned = meta(*shape, dtype=torch.bfloat16)
    saved = flash.Saved(rows_by_head(q), k_turned, v, o, meta(*shape[:3]))
    return (
        partial(rope_attention.forward, q, k, v, scale, rotation),
        partial(rope_attention.backward, o, saved, scale, None, rotation),
    )


def by_content(shape: Shape) -> Passes:
    """CARoPE alone."""
    q, k, _ = projections(shape)
    log_rates = meta(*shape[:3], dtype=torch.float64)
    q_turned, k_turned, *_, rates, carries = carope.fake_forward(q, k, log_rates, 0)
    out = torch.empty_like(q_turned), torch.empty_like(k_turned)
    return (
        partial(carope.forward, q, k, log_rates, None, 0),
        partial(carope.backward, *out, q_turned, k_turned, rates, carries, 0),
    )


def by_content_inside(shape: Shape) -> Passes:
    """CARoPE within attention."""
    q, k, v = projections(shape)
    log_rates, scale = meta(*shape[:3], dtype=torch.float64), shape[-1] ** -0.5
    q_turned, k_turned, *_, rates, carries = carope.fake_forward(q, k, log_rates, 0)
    o = rows_by_head(q)
    saved = flash.Saved(q_turned, k_turned, v, o, meta(*shape[:3]))
    return (
        partial(carope_attention.forward, q, k, v, log_rates, 0, scale),
        partial(carope_attention.backward, o, saved, rates, carries, 0, scale, None),
    )


def by_angle(shape: Shape) -> Passes:
    """CMHA alone."""
    q, k, _ = projections(shape)
    bands, turns = meta(shape[1], shape[-1] // 2), turns_of(shape)
    out = tuple(meta(*shape, dtype=torch.bfloat16) for _ in range(2))
    return (
        partial(polar.forward, q, k, bands, bands, turns, None),
        partial(polar.backward, *out, q, k, bands, bands, turns, None),
    )


def mixed(shape: Shape) -> Passes:
    """RCMHA's convolution."""
    q, k, v = projections(shape)
    weight, bias = meta(3, shape[-1], 3), meta(3, shape[-1])
    grads = (rows_by_head(q) for _ in range(3))
    return (
        partial(conv.forward, q, k, v, weight, bias, None),
        partial(conv.backward, *grads, q, k, v, weight, bias, None),
    )


def by_distance(shape: Shape, deterministic: bool = False) -> Passes:
    """RCMHA's attention."""
    q, k, v = projections(shape)
    _, heads, length, dim = shape
    table, offsets, u = meta(heads, length, dim), meta(heads, length), meta(heads, dim)
    o, scale = rows_by_head(q), dim**-0.5

    def forward() -> object:
        return relative.forward(relative.term(q, table, offsets, u, None, scale), k, v, scale)

    query = relative.Term(rows_by_head(q), q, table.to(q.dtype), offsets)
    back = partial(relative.backward, o, query, k, v, o, meta(*shape[:3]), scale, deterministic)
    return forward, back


def gathered(shape: Shape) -> Passes:
    """MoH's attention."""
    q, k, v = projections(shape)
    o, gates, scale = rows_by_head(q), meta(*shape[:3]), shape[-1] ** -0.5

    def forward() -> object:
        return routed.forward(q, k, v, routed.sort_rows(gates), scale)

    whole = meta(*shape[:3], dtype=torch.int32)
    ranks = meta(*shape[:2], shape[2] + 1, dtype=torch.int32)
    routing = routed.Routing(gates, whole, ranks)
    saved = flash.Saved(q, k, v, o, meta(*shape[:3]))
    return forward, partial(routed.backward, o, saved, routing, scale, None)


#: Calls of our kernels by the names of their rows and by provider.
OURS: dict[tuple[str, str], Callable[[Shape], Passes]] = {
    ("flash", "posenc"): plain,
    ("flash", "posenc split"): partial(plain, deterministic=True),
    ("flash", "posenc one kernel"): partial(plain, deterministic=False),
    ("rope", "posenc"): turned,
    ("rope + attention", "posenc"): turned_inside,
    ("carope", "posenc"): by_content,
    ("carope + attention", "posenc"): by_content_inside,
    ("polar", "posenc"): by_angle,
    ("conv", "posenc"): mixed,
    ("relative + attention", "posenc"): by_distance,
    ("relative + attention", "posenc deterministic"): partial(by_distance, deterministic=True),
    ("moh core", "skipping"): gathered,
}

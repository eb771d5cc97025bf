"""What the kernel files share: where kernels run, and tiles of strided matrices.

A tile is ROWS consecutive rows of a (length, D) matrix, held in BLOCK_D >= D columns because
Triton's shapes are powers of two. Elements outside the matrix are never touched: read as zero,
not written. Offsets are 64-bit: the rows of a packed projection lie 3*H*D apart, so 32 bits end
before a million tokens do.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

#: Whether kernels decorated in this process run in Triton's interpreter, on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: Options of every launch. Contracting multiply and add is Triton's default, but a changing one.
OPTIONS = {"enable_fp_fusion": True}

Op = TypeVar("Op", bound=Callable[..., Any])

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require_runnable(op: str, *tensors: Tensor) -> None:
    """ValueError unless `op` can run on these tensors: their device, and one supported dtype."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{op} needs one dtype and device; got {first.dtype} on {first.device} and "
                f"{tensor.dtype} on {tensor.device}. Convert them first."
            )
    if first.dtype not in DTYPES:
        raise ValueError(
            f"{op} takes bfloat16, float16 or float32; got {first.dtype}. "
            "Convert, or use impl='sdpa' or 'reference'."
        )
    if first.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{op} is a Triton kernel and needs CUDA tensors; got {first.device}. Use impl='sdpa', "
            "or set TRITON_INTERPRET=1 before Python starts to run it in Triton's interpreter."
        )
    if INTERPRETED and first.dtype == torch.bfloat16:
        raise ValueError(
            f"{op} got bfloat16, which Triton's interpreter computes wrongly. "
            "Use float32 or float16, or a CUDA device without TRITON_INTERPRET."
        )


def backward_only(op: Op) -> Op:
    """Decorate a public op: ValueError where anything but backward() would differentiate it.

    A custom op has no other gradient. Forward mode would lose its tangent without a word, and
    `torch.func.grad` would fail inside torch.
    """

    @functools.wraps(op)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if _transformed(*args, *kwargs.values()):
            raise ValueError(
                f"{op.__name__} is differentiated by backward() alone, neither in forward "
                "mode nor by torch.func. Use impl='reference', or for torch.func.grad "
                "'sdpa'."
            )
        return op(*args, **kwargs)

    return checked


def inference_only(op: Op) -> Op:
    """Decorate a public op without a gradient: ValueError where anything would differentiate it."""

    @functools.wraps(op)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if differentiated(*args, *kwargs.values()):
            raise ValueError(
                f"{op.__name__} has no gradient: it is for inference. Call it under "
                "torch.no_grad(), or differentiate by impl='reference' or 'sdpa'."
            )
        return op(*args, **kwargs)

    return checked


def differentiated(*given: Any) -> bool:
    """Whether backward(), forward mode or a transform of torch.func may go through any tensor."""
    tensors = (x for x in given if isinstance(x, Tensor))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return wanted or _transformed(*given)


def _transformed(*given: Any) -> bool:
    """Whether forward mode or a transform of torch.func differentiates by any tensor of these."""
    # Nearly always nothing is on, which takes 0.2 us to see. While compiling, the question would
    # become a node of the graph; torch.func.grad then fails in torch's words.
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    if not transformed and forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and _is_followed(x) for x in given)


def _is_followed(x: Tensor) -> bool:
    """Whether forward mode or a transform of torch.func differentiates by x."""
    while functorch.is_functorch_wrapped_tensor(x):
        # Of two levels of forward mode, the inner one cannot see a tangent of the outer.
        tangents = forward_ad._current_level >= 0
        if functorch.is_gradtrackingtensor(x) and (x.requires_grad or tangents):
            return True
        x = functorch.get_unwrapped(x)
    with torch._C._DisableFuncTorch():
        return forward_ad.unpack_dual(x).tangent is not None


def leave_out(ctx: Any, *outputs: Tensor) -> None:
    """Outputs of an op that have no gradient: backward is not given zeros of their size."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def of_one_output(differentiate: Callable) -> Callable:
    """The backward of an op of which `leave_out` leaves the first output alone."""

    @functools.wraps(differentiate)
    def checked(ctx: Any, gradient: Tensor | None, *others: None) -> tuple:
        if gradient is None:  # what came after gave None
            return (None,) * len(ctx.needs_input_grad)
        return differentiate(ctx, gradient)

    return checked


def check_weights(
    name: str, x: Tensor | None, device: torch.device, *shapes: tuple[int, ...]
) -> None:
    """ValueError unless None, or floating point of one of these shapes on the device."""
    if x is None:
        return
    # By `==` alone: torch.compile would make constants of what a set holds.
    shaped = any(x.shape == shape for shape in shapes)
    if not shaped or not x.is_floating_point() or x.device != device:
        expected = " or ".join(dict.fromkeys(map(str, shapes)))
        raise ValueError(
            f"{name} must be floating point {expected} on {device}; got "
            f"{x.dtype} {tuple(x.shape)} on {x.device}."
        )


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """The context in which to launch: Triton takes the current device, not the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows_by_head(x: Tensor) -> Tensor:
    """Uninitialised (B, H, T, D) like x, laid out (B, T, H, D)."""
    batch, heads, length, dim = x.shape
    shape = (batch, length, heads, dim)
    return torch.empty(shape, dtype=x.dtype, device=x.device).transpose(1, 2)


def strided(x: Tensor) -> tuple:
    """A (B, H, T, D) tensor as a kernel argument: the pointer, the four strides, and what divides
    those of the rows, at compile time: 16 or a smaller power of two, see `aligned`.
    """
    rows = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    return (x, *x.stride(), tl.constexpr(math.gcd(16, *rows)))


def tile_options(x: Tensor, config: Any) -> dict[str, Any]:
    """Launch arguments of a kernel whose tiles are `config`'s, for heads like those of x."""
    return {
        "D": x.shape[-1],
        "BLOCK_D": block_of(x),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "ieee",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **OPTIONS,
    }


def block_of(x: Tensor) -> int:
    """The columns that hold a head: a power of two, at least the 16 of a product."""
    return max(16, triton.next_power_of_2(x.shape[-1]))


@triton.constexpr_function
def any_given(*parts):
    """Whether any is more than None, in kernels at compile time. One by one: triton 3.6 hands over
    no tuple that holds None.
    """
    return any(part is not None for part in parts)


@triton.jit
def place_of(tiles):
    """Tile, head and batch row, the latter two 64-bit, in a grid of (tiles of all rows, heads): the
    second dimension holds 65,535 programs at most.
    """
    program, h = tl.program_id(0), tl.program_id(1)
    return program % tiles, h.to(tl.int64), (program // tiles).to(tl.int64)


@triton.jit
def aligned(stride, UNIT: tl.constexpr):
    """A stride of which UNIT is known to be a divisor, so that the compiler knows it too.

    Triton itself asks of a stride only whether 16 divides it. Rows of 40, 72 or 100 elements would
    be read two bytes at a time, though eight, or four, always lie side by side.
    """
    if UNIT > 1 and UNIT < 16:
        stride = stride // UNIT * UNIT
    return stride


@triton.jit
def head_of(x, b, h):
    """One head's matrix (pointer, stride of rows, stride of columns); b and h are 64-bit."""
    UNIT: tl.constexpr = x[5]
    start = x[0] + b * aligned(x[1], UNIT) + h * aligned(x[2], UNIT)
    return start, aligned(x[3], UNIT), x[4]


@triton.jit
def numbers_of(count, H, length, BLOCK: tl.constexpr):
    """A program's places in numbers (B, H, T), which of them exist, and their b, h and t."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return n, n < count, n // (H * length), n // length % H, n % length


@triton.jit
def rows_at(x, b, h, t, columns):
    """Where features `columns` of rows t, 64-bit, lie in a `strided`; b or h may differ by row."""
    start, stride, step = head_of(x, b, h)
    return (start + t * stride)[:, None] + columns.to(tl.int64)[None, :] * step


@triton.jit
def _pointers(matrix, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # Computed afresh in every turn of a loop: with `first` taken out of the tile's own offsets the
    # compiler keeps those in registers, 30 of them, and half as many programs fit.
    return _pointers_of(matrix, first + tl.arange(0, ROWS), BLOCK_D)


@triton.jit
def _inside(first, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = (first + tl.arange(0, ROWS) < length)[:, None]
    if BLOCK_D > D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    return inside


@triton.jit
def load_tile(
    matrix,
    first,
    length,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Rows first .. first + ROWS - 1 of a `head_of`; WHOLE promises that all of them exist."""
    at = _pointers(matrix, first, ROWS, BLOCK_D)
    if not WHOLE:
        tile = tl.load(at, mask=_inside(first, length, ROWS, D, BLOCK_D), other=0.0)
    elif BLOCK_D > D:
        tile = tl.load(at, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _pointers_of(matrix, rows, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    return matrix[0] + rows.to(tl.int64)[:, None] * matrix[1] + columns[None, :] * matrix[2]


@triton.jit
def load_rows(matrix, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows with these numbers of a `head_of`; zeros where `inside` is False."""
    columns = tl.arange(0, BLOCK_D)
    at = _pointers_of(matrix, rows, BLOCK_D)
    return tl.load(at, mask=inside[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(matrix, tile, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows with these numbers where `inside`, in the matrix' dtype."""
    columns = tl.arange(0, BLOCK_D)
    value = tile.to(matrix[0].dtype.element_ty)
    at = _pointers_of(matrix, rows, BLOCK_D)
    tl.store(at, value, mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def store_tile(
    matrix, tile, first, length, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write rows first .. first + ROWS - 1, as far as they exist, in the matrix' dtype."""
    at = _pointers(matrix, first, ROWS, BLOCK_D)
    value = tile.to(matrix[0].dtype.element_ty)
    tl.store(at, value, mask=_inside(first, length, ROWS, D, BLOCK_D))

"""Forward + backward of one attention layer, every zoo name beside a peer: `python -m bench.layer`.

The candidates take turns within every round, so that a slow moment of the machine hits all of them;
p20, p50 and p80 are over rounds. The peer is x-transformers' causal attention with flash and rotary
embeddings (`pip install x-transformers`), left out where it is not installed.
"""

import argparse
import importlib.util
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import posenc


def posenc_layer(name: str, embed_dim: int, heads: int, context: int) -> nn.Module:
    """One zoo entry; learned relative tables are as long as the context."""
    relative = name in ("rmha", "rcmha")
    options = {"max_distance": context} if relative else {}
    return posenc.attention(name, embed_dim, heads, **options)


def x_transformers_layer(embed_dim: int, heads: int) -> nn.Module:
    """x-transformers' attention as its decoder calls it: rotary frequencies once a forward."""
    from x_transformers.x_transformers import Attention, RotaryEmbedding

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            head_dim = embed_dim // heads
            self.attend = Attention(
                dim=embed_dim, heads=heads, dim_head=head_dim, causal=True, flash=True
            )
            self.rotary = RotaryEmbedding(head_dim)

        def forward(self, x: Tensor) -> Tensor:
            frequencies = self.rotary.forward_from_seq_len(x.shape[1])
            return self.attend(x, rotary_pos_emb=frequencies)

    return Rotary()


def step(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward of the layer, gradients of input and parameters."""
    parameters = [x, *layer.parameters()]

    def run() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            y = layer(x)
        # A gradient that is no constant, as a model's is.
        torch.autograd.backward(y, y.detach())
        for parameter in parameters:
            parameter.grad = None

    return run


def measure(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, sorted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number >= 2:  # two rounds of warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def main() -> None:
    """Print one row a candidate, with its ratio to `rope`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--names", nargs="+", default=list(posenc.names()))
    args = parser.parse_args()
    torch.manual_seed(0)
    layers = {
        name: posenc_layer(name, args.embed_dim, args.heads, args.length) for name in args.names
    }
    if importlib.util.find_spec("x_transformers"):
        layers["x-transformers rope"] = x_transformers_layer(args.embed_dim, args.heads)
    x = torch.randn(args.batch, args.length, args.embed_dim, requires_grad=True)
    dtype = getattr(torch, args.dtype)
    seconds = measure({name: step(layer, x, dtype) for name, layer in layers.items()}, args.rounds)
    print(
        f"B={args.batch} T={args.length} C={args.embed_dim} H={args.heads} {args.dtype}, "
        f"forward + backward, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"torch {torch.__version__}"
    )
    base = seconds.get("rope")
    print(f"{'layer':22} {'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'/ rope':>7}")
    for name, values in seconds.items():
        low, middle, high = (values[int(len(values) * p)] * 1e3 for p in (0.2, 0.5, 0.8))
        ratio = f"{values[len(values) // 2] / base[len(base) // 2]:7.2f}" if base else ""
        print(f"{name:22} {low:8.2f} {middle:8.2f} {high:8.2f} {ratio}")


if __name__ == "__main__":
    main()

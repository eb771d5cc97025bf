"""What a decoding step of a whole model costs, on CPU: `python -m bench.steps`.

    python -m bench.steps --out bench/results/cpu/steps.jsonl
    python -m bench.steps --names rope carope --layers 6 --past 1024

One more token of one sequence, after a past, all taking turns within a round:

    eager         as `generate` makes it
    compiled      as `generate(compile=True)` does, where torch has a compiler
    rotations     of eager: what its layers take to turn q and k, tables included
    transformers  Llama of that width and depth, as many parameters a layer (for `rope`)

Before anything is timed, the eager and the compiled step must give the logits of a whole forward
pass.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import posenc
from posenc.checks import check_heads
from posenc.errors import unknown
from posenc.models.gpt import compiled_step
from posenc.placement import Placement
from posenc.step_cache import StepModelCache
from posenc.tune.clock import take_turns

from .arguments import check_least
from .measure import reason, timing
from .rows import Row, RowFile, collect

VOCABULARY = 1024
#: Largest difference of logits in fp32, relative to the largest; sums over another order.
TOLERANCE = 1e-4
SECONDS = 4.0

Step = Callable[[], Tensor]


def eager(model: posenc.GPT, prompt: Tensor, token: Tensor) -> Step:
    """A step after the prompt, again and again."""
    past = prompt.shape[1]
    cache = model.make_cache(1, past + 1)
    model.hidden(prompt, cache=cache)

    def run() -> Tensor:
        cache.truncate(past)
        h, _ = model.hidden(token, cache=cache)
        return model.head(h[:, -1])

    return run


def compiled(model: posenc.GPT, prompt: Tensor, token: Tensor) -> Step:
    """The same, compiled."""
    past = prompt.shape[1]
    cache = model._generation_cache(1, past + 1, compile=True)
    model.hidden(prompt, cache=cache)
    memory, step = StepModelCache(cache), compiled_step("cpu")

    def run() -> Tensor:
        memory.at.fill_(past)
        return step(model, token, memory)

    return run


def rotations(model: posenc.GPT, past: int) -> Callable[[], None] | None:
    """What all layers take to turn one query and key, where their encoding turns by position."""
    attention = model.blocks[0].attn
    heads, dim = attention.num_heads, attention.head_dim
    q, k = torch.randn(1, 2 * heads, 1, dim).split(heads, dim=1)
    if attention.encoding.describe_rotation(Placement(torch.tensor([past]))) is None:
        return None

    def run() -> None:
        place = Placement(torch.tensor([past]))
        for block in model.blocks:
            rotation = block.attn.encoding.describe_rotation(place)
            assert rotation is not None
            rotation.apply(q, k)

    return run


def llama(args: argparse.Namespace, prompt: Tensor, token: Tensor) -> Step:
    """transformers' Llama; three matrices of 8/3 C a layer are as many numbers as two of 4 C.

    Raises:
        ImportError: it is not installed.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.embed_dim,
        intermediate_size=8 * args.embed_dim // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.past + 1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    cache = DynamicCache()
    model(prompt, past_key_values=cache, use_cache=True)

    def run() -> Tensor:
        logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
        cache.crop(-1)
        return logits

    return run


def gate(label: str, step: Step, expected: Tensor) -> str | None:
    """Why the step may not be timed, or None."""
    error = ((step() - expected).abs().max() / expected.abs().max()).item()
    return None if error <= TOLERANCE else f"no row of {label}: off by {error:.1e}"


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> Iterator[Row | str]:
    """The rows of one name; a line for what could not be timed."""
    torch.manual_seed(0)
    config = posenc.GPTConfig(
        vocab_size=VOCABULARY,
        context=args.past + 1,
        layers=args.layers,
        heads=args.heads,
        embed_dim=args.embed_dim,
        attention=name,
        bias=False,
    )
    model = posenc.GPT(config).eval()
    ids = torch.randint(VOCABULARY, (1, args.past + 1))
    prompt, token = ids[:, :-1], ids[:, -1:].contiguous()
    expected = model(ids).logits[:, -1]
    runs: dict[str, Callable[[], Any]] = {}
    steps = {"eager": eager, "compiled": compiled}
    for label, make in steps.items() if args.compile else [("eager", eager)]:
        try:
            step = make(model, prompt, token)
            refused = gate(f"{name}, {label}", step, expected)
        except Exception as failure:  # a compiler that is not there, or does not take it
            refused = f"no row of {name}, {label}: {reason(failure)}"
        if refused:
            yield refused
            continue
        runs[label] = step
    by_position = isinstance(model.blocks[0].attn.encoding, posenc.RoPE)
    if by_position and (turning := rotations(model, args.past)) is not None:
        runs["rotations"] = turning
    if name == "rope" and args.peers:
        try:
            runs["transformers llama"] = llama(args, prompt, token)
        except ImportError as failure:
            yield f"no row of transformers: {reason(failure)}"
    for label, quantiles in take_turns(runs, args.rounds, SECONDS).items():
        yield timing(
            "decode",
            "time",
            "ms",
            *quantiles,
            kind="steps",
            name=name,
            implementation=label,
            options=f"layers={args.layers}",
            dtype="float32",
            B=1,
            H=args.heads,
            T=1,
            S=args.past + 1,
            D=args.embed_dim // args.heads,
        )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Milliseconds a token, and how many times Llama's speed."""
    peer = {row.name: row.p50 for row in rows if row.implementation == "transformers llama"}
    for row in rows:
        llama_ms = peer.get("rope")
        compared = row.implementation in ("eager", "compiled") and llama_ms is not None
        ratio = f"{llama_ms / row.p50:.2f} x llama's speed" if compared and llama_ms else ""
        label = f"{row.name:12}{row.implementation:20}"
        yield f"{label}{row.p20:8.3f} {row.p50:8.3f} {row.p80:8.3f} ms   {ratio}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ValueError: for names or sizes that cannot be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=["rope"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--past", type=int, default=256, help="tokens before the step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=50, help="at least")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in posenc.names():
            raise ValueError(unknown("name", name, posenc.names()))
    check_least(1, layers=args.layers, past=args.past, rounds=args.rounds)
    check_heads(args.embed_dim, args.heads)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    try:
        args = parse(arguments)
        file = RowFile(args.out, torch.device("cpu"))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    rows: list[Row] = []
    refused = False
    for name in args.names:
        refused |= collect(measure(name, args), file, rows)
    print(f"\n{file.shared['device']}, {file.shared['threads']} threads, float32")
    print("                                     p20      p50      p80")
    print(*table(rows), sep="\n")
    if refused:
        sys.exit("a step was refused, see above")


if __name__ == "__main__":
    main()

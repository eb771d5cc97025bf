"""bench.throughput on tiny sizes: rows of every mode, name and peer; what is refused."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import posenc
from bench import throughput
from bench.layers import Layer, as_is, zoo_case
from bench.measure import Gate
from bench.peers import PEERS
from bench.rows import read, row_of
from posenc.tune.clock import take_turns

#: x-transformers scripts functions when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

SIZES = "--device cpu --embed-dim 16 --heads 4 --tokens 20 --rounds 1 --peak 1e9"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0.0)


def installed(implementation: str) -> bool:
    library = implementation.split()[0].replace("-", "_")
    return library == "nanogpt" or importlib.util.find_spec(library) is not None


@pytest.mark.usefixtures("quick")
def test_every_mode_name_and_peer_has_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    throughput.main([*SIZES.split(), "--lengths", "5", "--out", str(path)])
    rows = [row_of(values) for values in read(path)]
    zoo = {(name, impl) for name in posenc.names() for impl in ("auto", "sdpa", "reference")}
    peers = {key for key in PEERS if installed(key[1])}
    fox = {("fox", "x-transformers")}  # its cached step forgets nothing: refused
    expected = {("train", key) for key in zoo | peers} | {("prefill", key) for key in zoo | peers}
    expected |= {("recompute", key) for key in zoo | peers}
    expected |= {("decode", key) for key in (zoo | peers) - fox}
    timed = [row for row in rows if row.metric == "throughput"]
    assert {(row.mode, (row.name, row.implementation)) for row in timed} == expected
    assert len(timed) == len(expected)
    for row in timed:
        assert row.error_vs_fp64 is not None
        batch, length = (4, 5) if row.mode in ("train", "prefill") else (1, 5)
        assert (batch, 1 if row.mode == "decode" else length, 5) == (row.B, row.T, row.S)
    shares = {(row.name, row.implementation): row for row in rows if row.metric == "mfu"}
    assert shares.keys() == zoo | peers
    printed = capsys.readouterr().out
    assert "rope auto: decoding beats recomputing" in printed


@pytest.mark.usefixtures("quick")
def test_mfu_is_flops_over_peak(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = "--names nope --impls auto --modes train --lengths 5 --no-peers"
    throughput.main([*SIZES.split(), *arguments.split(), "--out", str(path)])
    tokens, share = (row_of(values) for values in read(path))
    # Products of 16 x 48, 16 x 16 a token, and of 15 pairs of q.k and of weights and v; 3 passes.
    flops = 4 * 3 * 2 * (5 * 16 * 64 + 2 * 15 * 16)
    assert share.p50 == pytest.approx(tokens.p50 / 20 * flops / 1e9)
    assert (share.metric, share.unit) == ("mfu", "1")


@pytest.mark.usefixtures("quick")
def test_the_peak_is_measured_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = "--names nope --impls auto --modes decode --lengths 5 --no-peers --device cpu"
    throughput.main([*arguments.split(), "--rounds", "1", "--out", str(path)])
    first = row_of(read(path)[0])
    assert (first.name, first.metric, first.unit) == ("matmul peak", "FLOP/s", "FLOP/s")


@pytest.mark.parametrize("key", PEERS, ids=" ".join)
@pytest.mark.parametrize(("batch", "length", "heads"), [(2, 33, 4), (1, 6, 3)])
def test_peers_compute_their_definition(
    key: tuple[str, str], batch: int, length: int, heads: int
) -> None:
    """On the same weights: Gate compares outputs and gradients with fp64."""
    if not installed(key[1]):
        pytest.skip(f"{key[1]} is not installed")
    torch.manual_seed(1)
    x = torch.randn(batch, length, 8 * heads, requires_grad=True)
    args = Namespace(names=[], impls=[], heads=heads, peers=True)
    (case,) = [
        case
        for case in throughput.cases(x, args)
        if not isinstance(case, str) and (case.name, *case.providers) == key
    ]
    layer = case.providers[key[1]]()
    Gate(case).check(layer)
    steps = {mode: error <= most for mode, error, most in throughput.step_errors(case, layer)}
    assert steps == {"prefill": True, "decode": key[0] != "fox"}


def test_a_wrong_cache_is_refused() -> None:
    class Forgetful(Layer):
        def __init__(self, right: Layer) -> None:
            super().__init__()
            self.right = right

        def forward(self, x: Tensor) -> Tensor:
            return self.right(x)

        def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, None]:
            return self.right(x), None

        def decode(self, token: Tensor, state: None) -> Tensor:
            return self.right(token)

    x = torch.randn(1, 5, 16, requires_grad=True)
    case = zoo_case("throughput", "rope", "rope", {"auto": ("auto", as_is)}, x, 2)
    right = case.providers["auto"]()
    found = list(throughput.candidates(case._replace(providers={"x": lambda: Forgetful(right)})))
    assert isinstance(found[0], str)
    assert "no decode of x: off by" in found[0]
    assert set(found[1].errors) == {"train", "recompute", "prefill"}


@pytest.mark.usefixtures("quick")
def test_what_fails_at_the_batch_of_decoding_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = throughput.one_token

    def failing(layer: Layer, x: Tensor) -> object:
        if layer.module.impl == "sdpa":
            raise RuntimeError("out of memory")
        return right(layer, x)

    monkeypatch.setattr(throughput, "one_token", failing)
    words = "--names rope --impls auto sdpa --modes decode --lengths 5 --no-peers --out"
    with pytest.raises(SystemExit, match="a layer of posenc was refused or failed"):
        throughput.main([*SIZES.split(), *words.split(), str(tmp_path / "rows.jsonl")])
    assert [row["implementation"] for row in read(tmp_path / "rows.jsonl")] == ["auto"]
    assert "rope: no decode of sdpa: out of memory" in capsys.readouterr().out


def test_of_a_layer_without_a_cache_the_forward_pass_is_measured() -> None:
    x = torch.randn(2, 5, 16, requires_grad=True)
    case = zoo_case("throughput", "rope", "rope", {"auto": ("auto", as_is)}, x, 4)
    plain = case.providers["auto"]().module
    said, found = throughput.candidates(case._replace(providers={"plain": lambda: plain}))
    assert said == "rope: no prefill and decode of plain: it is measured without a cache"
    assert isinstance(found, throughput.Candidate)
    assert found.errors.keys() == {"train", "recompute"}


def test_rates_rise_as_times_fall() -> None:
    assert throughput.rates(6, (1.0, 2.0, 3.0)) == {"p20": 2000.0, "p50": 3000.0, "p80": 6000.0}


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    found = take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, 9)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 11  # two of them to warm up
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 2  # in another order
    assert all(low <= middle <= high for low, middle, high in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--names rpoe", "rope"),
        ("--impls flash", "implementation"),
        ("--device gpu", "unknown device"),
        ("--device cpu:1", "unknown device"),
        ("--out .", "Is a directory: '.'"),
        ("--impls fused", "Triton"),
        ("--lengths 1", "--lengths must be at least 2; got 1"),
        ("--tokens 0", "--tokens must be at least 1"),
        ("--peak 0", "--peak must be above 0"),
        ("--heads 3", "embed_dim"),
        ("--embed-dim 12", "even head dim"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: str, message: str) -> None:
    if "fused" in arguments and torch.cuda.is_available():
        pytest.skip("fused runs here")
    with pytest.raises(SystemExit, match=message) as stopped:
        throughput.main(
            [*["--device", "cpu", "--embed-dim", "16", "--heads", "4"], *arguments.split()]
        )
    assert "\n" not in str(stopped.value)

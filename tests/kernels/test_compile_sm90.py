"""Every kernel and configuration, compiled for an H100 without one."""

import re

import pytest
import triton

from posenc.kernels import (
    decode,
    decode_relative,
    flash,
    inspect_sm90,
    projection,
    relative,
    routed,
)

#: At D=64 two programs of 256 threads should fit in the 65536 registers of a multiprocessor. Counts
#: move with the compiler, so this holds for the versions it was tuned on.
TWO_PROGRAMS = {"forward_kernel", "dq_kernel"}
ONE_CORE = ("flash bfloat16", "rope_attention bfloat16", "carope_attention bfloat16")
HALF = (*ONE_CORE, "relative bfloat16", "routed bfloat16", "biased_attention bfloat16")
#: The 16 rows of a tile are those of mma.sync; wgmma has 64.
FEW_QUERIES = ("decode bfloat16", "decode_relative bfloat16")
#: One number a token and head, as precise as its exponential can be.
DOUBLE = {"rates_kernel", "log_kernel", "dz_kernel"}
#: Bytes that are spilled outside of the innermost loops.
SPILLED = {("relative bfloat16 D=128 no offsets", "dkv_kernel"): 24}
#: A branch over the tiles that segments empty keeps loads from being started early.
IN_ORDER = {("biased_attention bfloat16 D=64 table masked", "by_distance_kernel")}
TUNED_ON = ("3.6.", "3.7.")
#: Examples whose loops are those of others; the command takes all. Small heads are the loops of
#: larger ones with fewer registers, odd ones those of the next power of two; fp32's masks are
#: bf16's, and so are its ways of reading phases, tables and rates; interleaved pairs, grouped
#: phases and decays are masked beside, and decoding has every part at once.
LEFT_OUT = (
    r"D=(16|32|40|72|80|100)\b",
    r"float32 .*(D=96|D=128|D=256|masked|atomic|interleaved|grouped|phases|decay|no offsets)",
    r"float32 .*(straight through|C=100|C=4096|H=1$)",
    r"rope_attention bfloat16 D=64 interleaved( atomic)?$",
    r"carope_attention bfloat16 D=64 grouped$",
    r"biased_attention bfloat16 D=64 (decay( atomic)?|table atomic)$",
    r"carope bfloat16 (D=128|D=256) phases",
    r"decode bfloat16 D=64 (masked|bias|gates)",
)
LAUNCHES = [
    pytest.param(f"{family} {name}", launch, id=f"{family} {name} {launch.kernel.__name__}")
    for family in inspect_sm90.families()
    for name, launch in inspect_sm90.launches(family)
    if not any(re.search(left_out, f"{family} {name}") for left_out in LEFT_OUT)
]


@pytest.mark.parametrize(("example", "launch"), LAUNCHES)
def test_compiled(example, launch):
    report = inspect_sm90.report(example, launch)
    assert report.spilled <= SPILLED.get((example, report.kernel), 0)
    assert report.shared <= inspect_sm90.SHARED_LIMIT
    assert (".f64" in report.ptx) == (report.kernel in DOUBLE)
    half, few = example.startswith(HALF), example.startswith(FEW_QUERIES)
    if example.startswith(ONE_CORE) and "D=64" in example and report.kernel in TWO_PROGRAMS:
        assert report.registers <= 128 or not triton.__version__.startswith(TUNED_ON)
    assert report.products == (report.tensor_cores != "-")
    if (half or few) and ("D=64" in example or "D=128" in example) and report.products:
        assert report.tensor_cores == ("mma" if few else "wgmma")
        mixed = few or (report.kernel == "dkv_kernel" and by_warps(example))
        assert ("mma.sync" in report.ptx) == mixed
        assert "cp.async" in report.ptx or (example, report.kernel) in IN_ORDER


def by_warps(example):
    """At D=128 these have products of fewer than 64 rows; larger tiles spill."""
    return "D=128" in example and ("atomic" in example or example.startswith("relative"))


#: Rows of which 16 is no divisor: the compiler is told what is.
UNEVEN = [
    pytest.param(f"{family} {name}", launch, id=f"{family} {name} {launch.kernel.__name__}")
    for family in ("flash", "carope", "conv", "decode", "decode_relative", "projection")
    for name, launch in inspect_sm90.launches(family)
    if name.startswith(tuple(f"bfloat16 D={dim}" for dim in (40, 72, 80, 100)))
    and "phases" not in name
]


@pytest.mark.parametrize(("example", "launch"), UNEVEN)
def test_rows_of_any_length_are_read_whole(example, launch):
    report = inspect_sm90.report(example, launch)
    assert "ld.global.b16" not in report.ptx
    if report.products:
        assert "cp.async" in report.ptx
    # Eight bytes at a time take twice the addresses.
    most = 32 if (example, report.kernel) == ("flash bfloat16 D=100", "dq_kernel") else 0
    assert report.spilled <= most or not triton.__version__.startswith(TUNED_ON)


#: Where larger tiles spill: their products are those of mma.sync, which divides columns too.
FEW_ROWS = {(flash, "dkv", 256), (flash, "dqkv", 256)}


@pytest.mark.parametrize("family", [flash, relative, routed])
def test_no_two_warps_compute_the_same_rows(family):
    """A wgmma of 4 warps has 64 rows; more warps than the tile has rows for repeat them."""
    for (kernel, size, block), config in family.CONFIGS.items():
        if size == 2 and (family, kernel, block) not in FEW_ROWS:
            rows = config.block_n if kernel in ("dkv", "dqkv") else config.block_m
            assert config.num_warps * 16 <= rows, (kernel, block)


@pytest.mark.parametrize(
    ("family", "users"),
    [
        (decode, ["decode"]),
        (decode_relative, ["decode_relative"]),
        (flash, ["flash", "biased_attention"]),
        (projection, ["projection"]),
        (relative, ["relative"]),
        (routed, ["routed"]),
    ],
    ids=lambda x: x.__name__ if hasattr(x, "__name__") else "",
)
def test_examples_cover_the_table(family, users, monkeypatch):
    used = set()

    class Recorder(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    monkeypatch.setattr(family, "CONFIGS", Recorder(family.CONFIGS))
    for user in users:
        inspect_sm90.launches(user)
    assert used == set(family.CONFIGS)


def test_command_takes_all_families_where_none_is_named(monkeypatch):
    taken = []
    monkeypatch.setattr(inspect_sm90, "launches", lambda family: taken.append(family) or [])
    monkeypatch.setattr("sys.argv", ["inspect_sm90"])
    inspect_sm90.main()
    assert taken == inspect_sm90.families()


def test_command_names_the_families_that_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["inspect_sm90", "flahs"])
    with pytest.raises(SystemExit) as stopped:
        inspect_sm90.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert "unknown family: 'flahs'. Did you mean 'flash'? Known: " in told[-1]


def test_command_prints_a_row_a_kernel(monkeypatch, capsys):
    one = inspect_sm90.launches("flash")[:1]
    monkeypatch.setattr(inspect_sm90, "launches", lambda family: one)
    monkeypatch.setattr("sys.argv", ["inspect_sm90", "flash"])
    inspect_sm90.main()
    heads, row = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["example", "kernel", "registers"]
    assert row.split()[:4] == ["flash", "bfloat16", "D=32", "forward_kernel"]
    assert row.split()[-1] == "wgmma"

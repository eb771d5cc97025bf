"""posenc.kernels.sass, and the committed table of what a tile costs."""

import math
from pathlib import Path

import pytest
import triton

from posenc.kernels import inspect_sm90
from posenc.kernels.sass import Loop, Use, loops, split, tile, use

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;  /* 0x0000000000000000 */
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], [R4.64] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   STG.E [R2.64], R4 ;
        /*0080*/               @P1 BRA 0x60 ;
        /*0090*/               @P2 BRA `(.L_x_3) ;
        /*00a0*/                   BRA 0x10 ;
        /*00b0*/                   BRA 0xc0 ;
        /*00c0*/                   EXIT ;
"""


def loop(instructions: int, wgmma: int = 0) -> Loop:
    return Loop(instructions, wgmma, 0, 0, 0, 0, 0, work=64 * wgmma)


def test_innermost_loops_are_counted() -> None:
    assert loops(SASS) == [
        Loop(4, wgmma=1, mma=0, copies=1, loads=0, stores=0, barriers=1, work=2 * 16 * 64 * 16),
        Loop(3, wgmma=0, mma=1, copies=0, loads=0, stores=1, barriers=0, work=2 * 16 * 8 * 16),
    ]
    assert loops("") == []


def test_code_is_in_a_loop_or_in_none() -> None:
    bodies, rest = split(SASS)
    assert [len(body) for body in bodies] == [4, 3]
    assert [text.split()[0] for text in rest] == ["MOV", "LDG.E", "@P2", "BRA", "BRA", "EXIT"]


def test_what_code_asks_of_the_units() -> None:
    (first, second), _ = split(SASS)
    # 16 of 64 rows, 64 columns, 16 deep; 16 bytes of each of 32 lanes.
    assert use(first) == Use(4, 0, wgmma=2 * 16 * 64 * 16, mma=0, copied=512, moved=0)
    assert use(second) == Use(3, 0, wgmma=0, mma=2 * 16 * 8 * 16, copied=0, moved=128)
    assert use(["HMMA.1688.F32.TF32 R4, R8, R12, R4 "]).mma == 2 * 16 * 8 * 8


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("LDG.E.128.CONSTANT R4, [R2.64]", 512),
        ("LDG.E R4, [R2.64]", 0),  # a vector
        ("STG.E.U16 [R2.64], R4", 64),
        ("STG.E.64 [R2.64], R4", 256),
        ("@P0 STG.E.128 [R2.64], R4", 512),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU [R2.64], R4", 512),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4", 128),
        ("LDS.128 R4, [R2]", 0),
    ],
)
def test_bytes_to_and_from_global_memory(text: str, moved: int) -> None:
    assert use([text]).moved == moved
    assert use([text, "MUFU.EX2 R4, R4", "NOP"])[:2] == (2, 1)


def test_a_tile_passes_one_of_those_that_do_the_same_and_no_other() -> None:
    masked, whole, before, ends = (loop(*x) for x in ((50, 8), (40, 8), (30, 4), (45, 4)))
    copy = loop(20)
    assert tile([ends, before, copy, masked, whole]) == [whole, before]
    assert tile([copy]) == []
    assert tile([]) == []


def test_the_same_number_of_products_is_not_the_same_work() -> None:
    wide, narrow = (Loop(9, 12, 0, 0, 0, 0, 0, work) for work in (768, 576))
    assert tile([narrow, wide]) == [wide, narrow]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "held"),
    [
        (128, 8, 65_536, 2),  # by registers: 65,536 / (128 * 256)
        (129, 8, 65_536, 1),  # by eights
        (166, 4, 57_344, 3),
        (32, 4, 0, 16),  # 64 warps
        (32, 1, 0, 32),
        (64, 4, 115_712, 2),  # by shared memory: 2 * (113 + 1) of 228 kB
        (64, 4, 116_736, 1),
    ],
)
def test_programs_of_a_processor(registers: int, warps: int, shared: int, held: int) -> None:
    assert inspect_sm90.programs(registers, warps, shared) == held


TABLE = Path(inspect_sm90.__file__).with_name("sm90.md").read_text().splitlines()


def test_the_table_holds_every_family_that_multiplies() -> None:
    named = {line.split()[1] for line in TABLE if "bfloat16" in line}
    attention = {"flash", "relative", "routed", "rope_attention", "carope_attention"}
    assert named >= attention | {"decode", "decode_relative"}
    for name, launch in inspect_sm90.launches("flash"):
        multiplies = launch.kernel.__name__ not in ("delta_kernel", "scale_kernel")
        if "bfloat16 D=64" in name and multiplies:
            assert any(f"| flash {name} | {launch.kernel.__name__} |" in line for line in TABLE)


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="the table is of triton 3.7.1")
@pytest.mark.parametrize("family", ["decode", "decode_relative", "flash", "relative", "routed"])
def test_the_table_is_what_is_compiled(family: str) -> None:
    found = list(inspect_sm90.tiles(family, dims=(64,), skip="masked"))
    assert found
    for line in inspect_sm90.rows_of(found):
        assert line in TABLE, "stale; python -m posenc.kernels.inspect_sm90 --instructions"
    if not family.startswith("decode"):  # which plain attention has no kernel of
        assert all(math.isfinite(tile.ratio) for tile in found)

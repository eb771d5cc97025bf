"""bench.h100: its arithmetic against small cases by hand, and what must rise."""

import pytest

from bench.h100 import (
    H100,
    NOTHING,
    Demand,
    Machine,
    Time,
    in_turns,
    kernel_time,
    key_turns,
    last_done,
    operation_time,
    row_turns,
)

#: Nothing but its two processors.
SMALL = Machine("small", processors=2, product=1.0, memory=10.0, l2=100.0, launch=0.0)


def test_one_program_takes_the_sum_and_many_the_largest() -> None:
    assert in_turns((1.0, 2.0, 3.0), 1) == 6.0
    assert in_turns((1.0, 2.0, 3.0), 1000) == pytest.approx(3.0, rel=1e-2)
    assert in_turns((0.0, 0.0, 0.0), 3) == 0.0


def test_programs_wait_for_one_another() -> None:
    """Of M equal units N programs take (N + M - 1) / N times one."""
    for units in (1, 2, 3):
        for programs in (1, 2, 5):
            expected = (programs + units - 1) / programs
            assert in_turns((1.0,) * units, programs) == pytest.approx(expected)
    # Two programs, units of 1 and 2: alone 3, then 1 (1 + 1/3) and 2 (1 + 2/3): 14/3 for both.
    assert in_turns((1.0, 2.0), 2) == pytest.approx(7 / 3)


def test_more_programs_are_no_slower() -> None:
    times = [in_turns((5.0, 4.0, 1.0), programs) for programs in range(1, 9)]
    assert times == sorted(times, reverse=True)
    assert all(5.0 <= time <= 10.0 for time in times)


def test_work_is_dealt_to_the_processor_that_is_free_first() -> None:
    assert last_done([3, 2, 2, 1], 2) == 4
    assert last_done([1, 2, 2, 3], 2) == 5  # the longest last: a tail
    assert last_done([1] * 5, 2) == 3  # waves
    assert last_done([7], 132) == 7


def test_a_kernel_takes_what_takes_longest() -> None:
    pieces = [Demand(issue=3, product=1, special=0, moved=0), Demand(1, 1, 0, 0)]
    # Twice over, on two processors: 3 1 | 1 3 at best, and 4 2 | 2 4 with one program each.
    time = kernel_time(pieces, 2, 1, bytes_=0, machine=SMALL)
    assert (time.best, time.turns, time.binds) == (4, 6, "issue")
    time = kernel_time(pieces, 2, 1, bytes_=50, machine=SMALL)
    assert (time.best, time.turns, time.binds) == (5, 6, "memory")
    far = [piece._replace(moved=200) for piece in pieces]
    time = kernel_time(far, 2, 1, bytes_=50, machine=SMALL)
    assert (time.best, time.turns, time.binds) == (8, 8, "L2")


def test_no_more_programs_meet_than_there_is_work_for() -> None:
    piece = Demand(issue=1, product=1, special=0, moved=0)
    assert kernel_time([piece], 2, 8, 0, SMALL).turns == 2  # one for each processor
    assert kernel_time([piece], 4, 8, 0, SMALL).turns == 3  # two: 3/2 each


def test_times_add_up_with_their_launches() -> None:
    first = operation_time(20, 0, SMALL._replace(launch=0.5))
    assert first == Time(2.5, 2.5, {"memory": 2.0, "launches": 0.5})
    second = operation_time(0, 9, SMALL)
    both = NOTHING + first + second
    assert (both.best, both.turns, both.binds) == (11.5, 11.5, "tensor cores")
    assert both.bound == {"memory": 2.0, "launches": 0.5, "tensor cores": 9.0}


@pytest.mark.parametrize("field", ["issue", "product", "special", "moved"])
def test_more_work_takes_no_less(field: str) -> None:
    piece = Demand(1e-6, 1e-6, 1e-6, 1e4)
    more = piece._replace(**{field: 1000 * getattr(piece, field)})
    before, after = (kernel_time([each], 999, 2, 1e6) for each in (piece, more))
    assert after.best >= before.best
    assert after.turns >= before.turns
    assert after != before
    assert kernel_time([piece], 1998, 2, 1e6).turns > before.turns


def test_faster_memory_takes_no_more() -> None:
    piece = Demand(1e-7, 1e-7, 1e-7, 1e3)
    fast = H100._replace(memory=2 * H100.memory)
    assert kernel_time([piece], 132, 1, 1e9, fast).best < kernel_time([piece], 132, 1, 1e9).best


def by_pairs(length: int, rows: list[list[int]], keys: list[list[int]]) -> list[tuple[int, int]]:
    """Turns of tiles of rows over tiles of keys: those in which all is seen, and in part."""
    found = []
    for tile in rows:
        seen = [[m >= n for m in tile for n in other] for other in keys]
        whole = sum(all(pairs) for pairs in seen)
        found.append((whole, sum(any(pairs) for pairs in seen) - whole))
    return found


def tiles(of: list[int], size: int) -> list[list[int]]:
    return [of[at : at + size] for at in range(0, len(of), size)]


@pytest.mark.parametrize("length", [128, 100, 1])
@pytest.mark.parametrize(("rows", "keys"), [(16, 8), (8, 8), (8, 16)])
def test_turns_of_rows_are_those_of_the_causal_triangle(length: int, rows: int, keys: int) -> None:
    every = list(range(length))
    expected = by_pairs(length, tiles(every, rows), tiles(every, keys))
    found = row_turns(length, rows, keys)[::-1]
    assert [sum(each) for each in found] == [sum(each) for each in expected]
    if length % keys == 0:  # elsewhere the kernel masks a last tile that all rows see
        assert found == expected


def test_turns_of_keys_by_hand() -> None:
    # 8 rows, tiles of 4 keys and 2 rows: keys 0..3 are all seen from row 3 on, which masks 0..3.
    assert key_turns(8, 4, 2) == [(2, 2), (0, 2)]
    assert sum(map(sum, key_turns(1024, 128, 64))) == sum(2 * (8 - i) for i in range(8))


@pytest.mark.parametrize("turns", [row_turns, key_turns])
def test_fewer_rows_take_fewer_turns(turns) -> None:
    counts = [sum(map(sum, turns(1024, 64, 64, share))) for share in (0.25, 0.5, 0.75, 1.0)]
    assert counts == sorted(set(counts))
    assert counts[1] == pytest.approx(counts[3] / 2, rel=0.1)

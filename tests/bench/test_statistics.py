"""bench.statistics: intervals, the crossed bootstrap, power."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from bench.statistics import (
    Bootstrap,
    holm,
    p_value,
    paired_bootstrap,
    power,
    seeds_needed,
    student,
)


def test_student_interval() -> None:
    # t(2, 0.975) = 4.302653; s = 1
    found = student([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert student([5.0]) == (5.0, -math.inf, math.inf)


def test_the_bootstrap_draws_seeds_and_units_crossed() -> None:
    """Against the exact distribution: all 2^2 3^3 equally likely draws."""
    d = np.array([[0.0, 1.0, 5.0], [2.0, 2.5, 11.0]])
    exact = sorted(
        float(np.mean([[d[s, u] for u in units] for s in seeds]))
        for seeds in itertools.product(range(2), repeat=2)
        for units in itertools.product(range(3), repeat=3)
    )
    found = paired_bootstrap(d, 200_000)
    for share, value in zip((0.025, 0.2, 0.5, 0.8, 0.975), found, strict=True):
        # Four standard errors of a share of 200,000 draws, and the atoms at its ends.
        slack = 4 * math.sqrt(share * (1 - share) / 200_000)
        below = sum(x < value - 1e-9 for x in exact) / len(exact)
        upto = sum(x <= value + 1e-9 for x in exact) / len(exact)
        assert below - slack <= share <= upto + slack
    # Units alone vary, or seeds alone: the interval is that of the others.
    assert paired_bootstrap(np.full((3, 7), 0.25)) == pytest.approx(Bootstrap(*5 * [0.25]))
    assert paired_bootstrap(d[:1]).high <= 5
    assert paired_bootstrap(d[:, :1])[::4] == (0.0, 2.0)


def test_the_bootstrap_is_the_same_in_chunks_and_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    d = np.random.default_rng(0).normal(size=(3, 50))
    whole = paired_bootstrap(d, 999, seed=4)
    assert paired_bootstrap(d, 999, seed=4) == whole
    assert paired_bootstrap(d, 999, seed=5) != whole
    monkeypatch.setattr("bench.statistics._CHUNK", 50 * 100)
    chunked = paired_bootstrap(d, 999, seed=4)
    assert chunked == pytest.approx(whole, abs=4 * d.std() / math.sqrt(d.size) / math.sqrt(999) * 3)


@pytest.mark.parametrize(
    ("gap", "n"), [(0.5, 3), (-1.0, 5), (0.0, 4), (0.3, 40), (9.0, 2), (5.0, 4), (2.0, 20)]
)
def test_power_is_that_of_the_definition(gap: float, n: int) -> None:
    """Z + gap sqrt(n) over chi / sqrt(n-1), integrated over chi."""
    critical, centre = stats.t.ppf(0.975, n - 1), gap * math.sqrt(n)

    def rejected(chi: float) -> float:
        bound = critical * chi / math.sqrt(n - 1)
        share = stats.norm.sf(bound - centre) + stats.norm.cdf(-bound - centre)
        return float(share * stats.chi.pdf(chi, n - 1))

    expected, _ = integrate.quad(rejected, 0, math.sqrt(n - 1) + 12)
    assert power(gap, 1.0, n) == pytest.approx(expected, abs=1e-6)
    assert power(2 * gap, 2.0, n) == pytest.approx(expected, abs=1e-6)


def test_power_keeps_its_word_in_simulation() -> None:
    generator, n = np.random.default_rng(1), 6
    draws = generator.normal(1.5, 1.0, (20_000, n))
    found = np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05)
    expected = power(1.5, 1.0, n)
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)


@pytest.mark.parametrize("ratio", [100.0, 6.5, 4.7, 3.0, 1.0, 0.3, 0.05])
def test_seeds_needed_is_the_first_that_suffices(ratio: float) -> None:
    n = seeds_needed(ratio * 0.01, 0.01)
    assert n == seeds_needed(-ratio * 0.01, 0.01)
    assert power(ratio, 1.0, int(n)) >= 0.8
    assert n == 2 or power(ratio, 1.0, int(n) - 1) < 0.8


def test_seeds_needed_at_the_ends() -> None:
    assert seeds_needed(0.0, 1.0) == math.inf
    assert seeds_needed(0.001, 1.0) == math.inf  # (2.8 / 0.001)^2 of them
    assert seeds_needed(1e6, 1.0) == seeds_needed(1e300, 1.0) == seeds_needed(0.1, 0.0) == 2
    assert seeds_needed(0.0, 0.0) == math.inf
    # Of 2 seeds half would find six standard deviations, t(1, 0.975) being 12.7.
    assert seeds_needed(6.0, 1.0) == 3
    # A textbook's: an effect of half a standard deviation needs 34 pairs.
    assert seeds_needed(0.5, 1.0) == 34


def test_p_is_that_of_the_t_test() -> None:
    values = [0.1, 0.4, -0.2, 0.3, 0.25]
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert p_value([-x for x in values]) == p_value(values)
    assert (p_value([0.0, 0.0]), p_value([0.5, 0.5])) == (1.0, 0.0)


def test_holm_on_a_worked_example() -> None:
    # 4 tests: 4 * .005 = .02, 3 * .01 = .03, 2 * .03 = .06, and .04 not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []

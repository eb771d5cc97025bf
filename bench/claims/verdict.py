"""The rule that makes a verdict of an interval; no verdict is written by hand.

Everything is turned so that positive is in the claim's favour. Let h be half of the published
effect, m the tolerance (how much worse still counts as no worse; 0 where nothing else is said), and
low .. high a 95% interval of what was measured here:

    contradicted    high < h - m                  no effect of half the claimed size
    reproduced      low > -m and high >= h - m    an effect, and perhaps as large as that
    within noise    otherwise                     more seeds could tell

A claim of several comparisons holds where all of them do.
"""

from collections.abc import Sequence

from ..statistics import Interval

REPRODUCED = "reproduced"
WITHIN_NOISE = "within noise"
CONTRADICTED = "contradicted"
NOT_RUNNABLE = "not runnable as stated"
OPEN = "open: no rows"

#: What decides among several comparisons, before what.
ORDER = (CONTRADICTED, OPEN, WITHIN_NOISE, REPRODUCED)


def judge(found: Interval, half: float, tolerance: float = 0.0) -> str:
    """The verdict on one comparison.

    Args:
        found: in the claim's favour, in the unit of `half`.
        half: of the published effect, 0 where it was published in another unit.
        tolerance: m.
    """
    assert half >= 0 <= tolerance
    if found.high < half - tolerance:
        return CONTRADICTED
    return REPRODUCED if found.low > -tolerance else WITHIN_NOISE


def combine(verdicts: Sequence[str]) -> str:
    """Of a claim that all of its comparisons must bear out: one against it is enough, one without
    rows leaves it open. Raises ValueError without any.
    """
    if not verdicts:
        raise ValueError("no comparison decides. Let at least one.")
    return min(verdicts, key=ORDER.index)

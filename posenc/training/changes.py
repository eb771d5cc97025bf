"""What a resumed run does otherwise than before: a line for the user, None where it is the same."""

from collections.abc import Mapping
from typing import Any

from posenc.training.config import TrainConfig


def launched_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two launches, of what both are known to have."""
    changed = [
        f"{name} {value} (was {before[name]})"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if not changed:
        return None
    return (
        f"launched otherwise than before: {', '.join(changed)}. "
        "--parallel, --device and --tracker are each launch's own."
    )


def learning_rate_jump(step: int, before: TrainConfig, now: TrainConfig) -> str | None:
    """The learning rate of the step after `step`, where it is not what it would have been."""
    rate, expected = now.learning_rate(step), before.learning_rate(step)
    if step == now.steps or rate == expected:
        return None
    text = f"the learning rate goes on with {rate:.3g}, where the run so far had {expected:.3g}"
    if now.decay_end == before.decay_end:
        return f"{text}."
    return (
        f"{text}: it falls until step {now.decay_end}, not {before.decay_end}. "
        f"--decay-steps {before.decay_end} keeps the decay as it was."
    )

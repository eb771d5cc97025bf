"""The loss plot of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posenc.files import atomic_file


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """The exponential moving average, unbiased from the first value on."""
    mean, total, averages = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        averages.append(mean / total)
    return averages


def loss_plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over the steps into a PNG.

    Args:
        rows: of metrics.jsonl.
    """
    from matplotlib.figure import Figure  # without pyplot there is no display to look for

    steps = [row["step"] for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    checked = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", label="training (smoothed)")
    if checked:
        axes.plot(
            list(checked), list(checked.values()), "o-", color="tab:orange", label="validation"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

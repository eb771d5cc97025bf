"""The learning rate as a function of the step: linear warm-up, then a cosine down to a floor."""

import math


def learning_rate(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """The rate of step 0, 1, ...

    Before `warmup` it is lr (step + 1) / (warmup + 1); until `decay_steps` it is
    min_lr + (lr - min_lr) (1 + cos(pi x)) / 2 with x = (step - warmup) / (decay_steps - warmup);
    then min_lr.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step >= decay_steps:
        return min_lr
    x = (step - warmup) / (decay_steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * x))

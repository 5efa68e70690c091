"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from fastadv.pretrain.settings import Settings


def rate(settings: Settings, step: int) -> float:
    r"""Warm up linearly over `warmup` steps, then follow half a cosine down to the least rate.

    .. math:: \eta_t = \eta \, (t + 1) / W \text{ for } t < W, \qquad
        \eta_t = \eta \Big(m + \frac{1 - m}{2} \big(1 + \cos \pi \tfrac{t - W}{T - W}\big)\Big) \text{ then}

    W warm-up steps of T in all, eta the `learning_rate`, m `min_learning_rate`, a share of it. `step` counts from 0.

    Examples:
        >>> from fastadv.pretrain.settings import Settings
        >>> settings = Settings(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
        >>> [round(rate(settings, step), 3) for step in (0, 9, 10, 55, 99)]
        [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    warmup = settings.warmup
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    way = (step - warmup) / max(1, settings.max_steps - warmup)
    least = settings.min_learning_rate
    return settings.learning_rate * (least + (1 - least) / 2 * (1 + math.cos(math.pi * way)))

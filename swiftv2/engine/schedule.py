"""Learning rate as a pure function of the step."""

import math

from swiftv2.config.engine import ScheduleConfig


def learning_rate(step: int, config: ScheduleConfig, peak: float, max_steps: int) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: number of the step, from 1 to `max_steps`; 0 stands for the start of the warm-up.
        config: kind, warm-up, cooldown, final ratio.
        peak: rate after the warm-up.
        max_steps: steps of the whole run.

    Returns:
        The rate: linear from 0 to `peak` over the warm-up; then a cosine to `final_ratio x peak` at the last step, or
        constant with a linear fall to `final_ratio x peak` over the last `cooldown_steps`. In a run too short for warm-up
        and cooldown the smaller of both holds.
    """
    warm = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.kind == "cosine":
        decaying = max(1, max_steps - config.warmup_steps)
        progress = min(1.0, max(0.0, (step - config.warmup_steps) / decaying))
        fall = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = max(0, max_steps - step)
        fall = min(1.0, left / config.cooldown_steps) if config.cooldown_steps else 1.0
    return peak * min(warm, config.final_ratio + (1.0 - config.final_ratio) * fall)

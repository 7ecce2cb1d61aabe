"""Learning-rate schedules, as pure functions of the step."""

import math
from dataclasses import dataclass

from mla_lm.errors import UserError


@dataclass
class ScheduleConfig:
    """Warm-up, then cosine decay; or warm-up, a stable phase, then linear decay (wsd, arXiv 2404.06395)."""

    kind: str = "cosine"  # cosine | wsd
    warmup_fraction: float = 0.05  # share of the run's steps
    decay_fraction: float = 0.3  # wsd: share of the run's steps, at its end
    final_lr_fraction: float = 0.1  # share of the peak, reached at the last step

    def check(self) -> None:
        """Raise UserError for invalid values."""
        if self.kind not in ("cosine", "wsd"):
            raise UserError(f"schedule.kind={self.kind} is unknown: cosine or wsd")
        for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name}={getattr(self, name)} must lie between 0 and 1")
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise UserError("schedule.warmup_fraction and schedule.decay_fraction add up to more than 1")


def lr_factor(step: int, max_steps: int, config: ScheduleConfig) -> float:
    """The factor on the peak learning rate at a step, 0 to max_steps - 1."""
    warmup = round(config.warmup_fraction * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    decay = max_steps - warmup if config.kind == "cosine" else round(config.decay_fraction * max_steps)
    progress = min(1.0, max(0.0, (step + 1 - (max_steps - decay)) / max(1, decay)))
    falling = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * falling

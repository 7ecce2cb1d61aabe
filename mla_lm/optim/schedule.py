"""What changes over the steps of a run, as pure functions of the step: the learning rate, and the windows' length."""

import math
from dataclasses import dataclass

from mla_lm.errors import UserError
from mla_lm.keys import check_at_least


@dataclass
class ScheduleConfig:
    """Warm-up, then cosine decay; or warm-up, a stable phase, then linear decay (wsd, arXiv 2404.06395).

    Training may begin on shorter windows than the model's seq_len (arXiv 2108.06084): those of the data are cut into
    pieces, so that the tokens and their order stay the same.
    """

    kind: str = "cosine"  # cosine | wsd
    warmup_fraction: float = 0.05  # share of the run's steps
    decay_fraction: float = 0.3  # wsd: share of the run's steps, at its end
    final_lr_fraction: float = 0.1  # share of the peak, reached at the last step
    short_seq_len: int | None = None  # tokens of the windows that training begins on; None: model.seq_len
    short_fraction: float = 0.5  # share of the run's steps, at its beginning, that read them

    def check(self) -> None:
        """Raise UserError for invalid values."""
        if self.kind not in ("cosine", "wsd"):
            raise UserError(f"schedule.kind={self.kind} is unknown: cosine or wsd")
        for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction", "short_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name}={getattr(self, name)} must lie between 0 and 1")
        check_at_least(1, self, "schedule.", "short_seq_len")
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


def window_length(step: int, max_steps: int, seq_len: int, config: ScheduleConfig) -> int:
    """Tokens of the windows that a step trains on."""
    short = min(config.short_seq_len or seq_len, seq_len)
    return short if step < round(config.short_fraction * max_steps) else seq_len


def mean_window_length(max_steps: int, seq_len: int, config: ScheduleConfig) -> float:
    """The same, averaged over a run's steps."""
    share = round(config.short_fraction * max_steps) / max_steps
    return share * window_length(0, max_steps, seq_len, config) + (1 - share) * seq_len

"""What a study or a comparison found, as plain data: made once, read by the tables, the plots, the report and wandb."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Estimate:
    """A figure over seeds: its values, their mean, and a 95% interval of the mean.

    The interval is None with fewer than two values: one run says nothing about the spread.
    """

    values: list[float]
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def scaled(self, factor: float) -> "Estimate":
        """The estimate of `factor` times the figure; the factor is above 0."""
        low, high = (end if end is None else end * factor for end in (self.low, self.high))
        return Estimate([value * factor for value in self.values], self.mean * factor, low, high)


@dataclass
class Curve:
    """Validation of a row over its training, as means over the seeds at the steps that all of them have."""

    tokens: list[int]
    seconds: list[float]
    flops: list[float]
    loss: list[Estimate]
    bits_per_byte: list[Estimate]


@dataclass
class Decoding:
    """Greedy decoding of one sequence after a context."""

    context: int  # cached tokens
    tokens_per_second: float
    cache_bytes: int


@dataclass
class Sample:
    """Greedy text of a row's first seed."""

    prompt: str
    text: str


@dataclass
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        name: unique in the result
        kind: a name in `mla_lm.attention.KINDS`
        figures: one number each: parameters, flops_per_token, cache_bytes_per_token, cache_vs_mha, tokens_seen, lr
        estimates: val_loss, val_perplexity, val_bits_per_byte, the same of test, tokens_per_second, peak_memory_bytes
        difference: of test_loss to the baseline row, over seeds and test windows that both share; None: no baseline
        baseline: the name of that row
        position: mean test loss at each position of the window, in nats
        tried: learning rates tried, with the validation loss of each
    """

    name: str
    kind: str
    size: str
    runs: list[str]
    seeds: list[int]
    figures: dict[str, float]
    estimates: dict[str, Estimate]
    curve: Curve | None = None
    difference: Estimate | None = None
    baseline: str | None = None
    position: list[float] = field(default_factory=list)
    decoding: list[Decoding] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    tried: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # "2 of 5 seeds are unfinished", said beside the row


@dataclass
class Fit:
    """A power law of test loss against parameters for one kind: loss = factor * parameters ** exponent.

    Attributes:
        exponent: with its 95% interval; it has no values
        parameters, loss: points of the line
        low, high: 95% interval of the mean loss at each point; empty with fewer than three runs
        rows: names of those that it is fitted to
    """

    exponent: Estimate
    factor: float
    parameters: list[float]
    loss: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)


@dataclass
class Result:
    """A study or a comparison.

    Attributes:
        views: what the rows are matched by (parameters, cache, flops), with the names of the rows in each
        corpus: fingerprint and description, of every corpus there is
        machine: processor, device, threads, precision, versions of Python, torch and mla_lm, git commit
        configs: config.yaml of the first run of each row
        fits: by kind, where rows of several sizes are compared
    """

    title: str
    command: str
    date: str
    rows: list[Row]
    views: dict[str, list[str]] = field(default_factory=dict)
    corpus: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # a line for each job that failed or has not finished

    def notes(self) -> dict[str, list[str]]:
        """Each note, with the names of the rows that have it."""
        said: dict[str, list[str]] = {}
        for row in self.rows:
            for note in dict.fromkeys(row.notes):
                said.setdefault(note, []).append(row.name)
        return said

    def relative_difference(self, row: Row) -> Estimate | None:
        """A row's difference as a share of its baseline's mean test loss; None without one, or without the baseline."""
        base = next((other for other in self.rows if other.name == row.baseline), None)
        if row.difference is None or base is None:
            return None
        return row.difference.scaled(1 / base.estimates["test_loss"].mean)

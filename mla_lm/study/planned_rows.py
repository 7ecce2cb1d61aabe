"""The rows of a study: models that are compared, each with the settings of train.py that make it.

A row of `kinds` is a preset. The others have the parameters of the baseline's preset, by the width of their
feed-forward: `variants`, and in the view by cache bytes an MLA with the cache of another kind. In the view by training
FLOPs a row trains for other steps, where it would differ from the baseline by more than MATCHED.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from mla_lm.attention import KINDS
from mla_lm.config import TrainConfig
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.size import ModelSize, model_size
from mla_lm.study.compose import check_without_data, train_config
from mla_lm.study.declaration import Entry, StudyConfig, parsed
from mla_lm.training.resolve import choose_tokens_per_step

MATCHED = 0.01  # largest difference in parameters, cache or FLOPs that counts as equal
MULTIPLE = 8  # of the feed-forward's width: GPUs multiply such matrices fastest


@dataclass
class PlannedRow:
    """Runs that differ in their seed alone, and before them those that tune the learning rate.

    Attributes:
        name: unique in the study; its folder
        overrides: of train.py, which steps, learning rate and seed complete
        tokens: that each run trains on, in so many steps
        views: in which the row is compared
        baseline: name of the row that it is compared with
        rate_of: name of the row whose learning rate it takes; None: its own
    """

    name: str
    kind: str
    size: str
    overrides: list[str]
    config: TrainConfig
    sizes: ModelSize
    tokens: int
    steps: int = 0
    views: list[str] = field(default_factory=list)
    baseline: str | None = None
    rate_of: str | None = None

    @property
    def flops(self) -> float:
        """Of a run's training."""
        return self.sizes.flops_per_token * self.tokens


class Planner:
    """Makes the rows of a study.

    Args:
        conf: the folder of train.yaml

    Raises:
        UserError and Hydra's errors: a row that train.py would refuse, or that cannot be matched.
    """

    def __init__(self, study: StudyConfig, conf: Path):
        self.study, self.conf = study, conf
        self.shared = [*parsed(f"- {study.corpus}").overrides, *study.settings]

    def rows(self) -> list[PlannedRow]:
        rows: dict[str, PlannedRow] = {}
        for size in map(parsed, self.study.sizes):
            for row in self._of_size(size):
                if row.name in rows:
                    raise UserError(f"{row.name} is declared twice: leave one out of kinds, variants or sizes")
                rows[row.name] = row
        return list(rows.values())

    def _of_size(self, size: Entry) -> list[PlannedRow]:
        study = self.study
        entries = [parsed(entry) for entry in study.kinds or KINDS]
        reference = next((entry for entry in entries if entry == Entry(study.baseline or "", [])), entries[0])
        config = self._config(reference, size)[1]  # its tokens, of a run and of a step, are those of all kinds
        if config.tokens_per_step is None:
            size = size._replace(overrides=[*size.overrides, f"tokens_per_step={choose_tokens_per_step(config)[0]}"])
        tokens = self._tokens(config)
        rows = [self._row(entry, size, tokens) for entry in entries]
        of_kind = {row.kind: row for entry, row in reversed(list(zip(entries, rows, strict=True)))}
        baseline = of_kind[study.baseline] if study.baseline else None
        parameters = (baseline or rows[0]).sizes.parameters
        variants = [self._row(parsed(entry), size, tokens, parameters) for entry in study.variants]
        for row in variants:
            row.rate_of = of_kind[row.kind].name if row.kind in of_kind else None
        for row in [*rows, *variants]:
            row.baseline = baseline.name if baseline and row is not baseline else None
            row.views = ["parameters"] if "parameters" in study.views else []
        if "cache" in study.views:
            variants += self._by_cache(size, of_kind, tokens)
        if "flops" in study.views and baseline:
            variants += self._by_flops(rows, baseline)
        return [row for row in [*rows, *variants] if row.views]

    def _tokens(self, config: TrainConfig) -> int:
        if self.study.tokens is not None:
            return self.study.tokens
        assert self.study.tokens_per_parameter  # as StudyConfig.check sees to
        return round(self.study.tokens_per_parameter * model_size(config.model).parameters)

    def _config(self, entry: Entry, size: Entry) -> tuple[list[str], TrainConfig]:
        """The overrides of an entry, and the configuration that they make."""
        preset = f"{entry.name}_{size.name}"
        if not (self.conf / "model" / f"{preset}.yaml").is_file():
            stems = [file.stem.rpartition("_") for file in (self.conf / "model").glob("*.yaml")]
            sizes = [size for kind, _, size in stems if kind == entry.name]
            raise UserError(f"sizes: there is no model={preset}; {entry.name} has the sizes {', '.join(sorted(sizes))}")
        overrides = [f"model={preset}", *size.overrides, *entry.overrides, *self.shared]
        return overrides, train_config(self.conf, overrides)

    def _row(
        self, entry: Entry, size: Entry, tokens: int, parameters: int | None = None, name: str | None = None
    ) -> PlannedRow:
        """A row for so many tokens, and made to have so many parameters unless it sets the feed-forward itself."""
        overrides, config = self._config(entry, size)
        if parameters and not any(override.startswith("model.ff_hidden=") for override in entry.overrides):
            config.model.ff_hidden = matching_width(config.model, parameters)
            overrides.append(f"model.ff_hidden={config.model.ff_hidden}")
        name = name or f"{entry.name}_{size.label}{entry.label.removeprefix(entry.name)}"
        row = PlannedRow(
            name, entry.name, size.label, overrides, config, model_size(config.model, config.mean_window_length), tokens
        )
        return lasting(row, tokens)

    def _by_cache(self, size: Entry, of_kind: dict[str, PlannedRow], tokens: int) -> list[PlannedRow]:
        """For each kind of cache_of, an MLA with its cache and its parameters, compared with it."""
        made = []
        mla = of_kind.get("mla") or self._row(Entry("mla", []), size, tokens)
        for kind in self.study.cache_of:
            other = of_kind.get(kind) or self._row(Entry(kind, []), size, tokens)
            row, elements = mla, _cached(other)
            if abs(_cached(mla) - elements) > MATCHED * elements:
                latent = round(elements - _cached(mla) + (mla.config.model.attention.kv_compressed_dim or 0))
                entry = Entry("mla", [f"model.attention.kv_compressed_dim={latent}"])
                row = self._row(entry, size, tokens, other.sizes.parameters, f"{mla.name}-cache_of_{kind}")
                row.rate_of, row.baseline = mla.name if "mla" in of_kind else None, other.name
            for one in (other, row):
                one.views = list(dict.fromkeys([*one.views, "cache"]))
            made += [one for one in (other, row) if one not in of_kind.values()]
        return made

    def _by_flops(self, rows: list[PlannedRow], baseline: PlannedRow) -> list[PlannedRow]:
        """For each row, itself or the same model trained for the FLOPs of the baseline."""
        made = []
        for row in rows:
            if abs(row.flops - baseline.flops) > MATCHED * baseline.flops:
                other = lasting(row, round(baseline.flops / row.sizes.flops_per_token))
                other.name, other.views = f"{row.name}-flops_of_{baseline.kind}", ["flops"]
                other.rate_of, other.baseline = row.name, baseline.name
                made.append(other)
            else:
                row.views.append("flops")
        return made


def lasting(row: PlannedRow, tokens: int) -> PlannedRow:
    """A copy of a row that trains on so many tokens, to the nearest step."""
    steps = max(1, round(tokens / row.config.step_tokens))
    config = replace(row.config, trainer=replace(row.config.trainer, max_steps=steps))
    check_without_data(config)
    return replace(row, config=config, steps=steps, tokens=steps * config.step_tokens, views=[])


def matching_width(model: TransformerConfig, parameters: int) -> int:
    """The width of the feed-forward with which a model has the nearest number of parameters, a multiple of MULTIPLE.

    Raises:
        UserError: attention alone has more than that.
    """
    here = model_size(model).parameters
    wider = model_size(replace(model, ff_hidden=model.ff_hidden + MULTIPLE)).parameters
    width = model.ff_hidden + MULTIPLE * (parameters - here) / (wider - here)
    if width < MULTIPLE:
        raise UserError(
            f"{model.attention.kind} of such sizes has more than {parameters:,} parameters without any feed-forward: "
            "a smaller latent, or model.ff_hidden beside it, which leaves it unmatched"
        )
    return MULTIPLE * round(width / MULTIPLE)


def _cached(row: PlannedRow) -> float:
    return row.sizes.cache_elements_per_token_per_layer

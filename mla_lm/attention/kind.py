"""The interface of a kind of attention: what its file declares, and the options that all kinds share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from mla_lm.attention.layer import AttentionLayer
from mla_lm.attention.rope import YarnConfig
from mla_lm.errors import UserError


@dataclass
class SharedOptions:
    """The keys of `model.attention` that every kind reads."""

    kind: str = "mha"  # a name in mla_lm.attention.kinds.KINDS
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)


# The default of a size that a configuration works out from others; it is None until then.
DERIVED = cast(int, None)


class LayerConfig(Protocol):
    """The checked sizes of one attention layer."""

    num_heads: int
    seq_len: int

    @property
    def head_dim(self) -> int:
        """Width of a head's queries and keys, or of its values, whichever is wider."""
        ...

    @property
    def cached_elements(self) -> int:
        """Elements per token in the cache of a layer; a layer that reads its predecessor's cache has none."""
        ...

    @property
    def macs_per_key(self) -> int:
        """Multiply-adds for one query and one key over all heads: score and weighted value, without projections."""
        ...

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds per token that are neither products with weights nor in `macs_per_key`."""
        ...

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        ...


@dataclass(frozen=True)
class TransformersForm:
    """How a model class of `transformers` stores this attention.

    Attributes:
        architecture: name of the class in config.json
        projections: maps our names of the layer's modules to theirs within `self_attn`
        entries: maps entries of config.json to the fields of the layer's configuration that give their values
        rotated: modules whose output RoPE rotates in the last rows of each head. Those rows are paired as (2i, 2i + 1)
            there and as (i, i + D/2) here. Each name maps to two fields of the layer's configuration: the number of
            heads (None: one), and the number of rows in a head before the rotated ones.
    """

    architecture: str
    projections: dict[str, str]
    entries: dict[str, str]
    rotated: dict[str, tuple[str | None, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention. Each is defined in its own file and registered in `mla_lm.attention.kinds`.

    Attributes:
        title: the name in full
        options: dataclass of the keys of `model.attention` that only this kind reads
        layer_config: makes and checks a `LayerConfig`. It takes d_model, num_heads, seq_len, dropout, use_bias,
            rope_base and yarn by keyword, and every field of `options`; raises UserError for invalid sizes.
        layer: the module, made from a `LayerConfig`
        transformers: how `scripts.export` writes the weights; None: no model class of transformers can hold them
        reader: the module of every second layer, where it reads the keys of the layer before it instead of computing
            and caching its own; None: all layers are alike
    """

    title: str
    options: type
    layer_config: Callable[..., LayerConfig]
    layer: Callable[..., AttentionLayer]
    transformers: TransformersForm | None = None
    reader: Callable[..., AttentionLayer] | None = None

    @property
    def period(self) -> int:
        """After how many layers their modules repeat."""
        return 1 if self.reader is None else 2

    def layer_at(self, index: int, config: LayerConfig) -> AttentionLayer:
        """Make the attention of the layer with this index; the first is 0."""
        return self.reader(config) if self.reader is not None and index % 2 else self.layer(config)

    def caches(self, num_layers: int) -> int:
        """How many of so many layers have a cache."""
        return -(-num_layers // self.period)


def check_positive(config: object, *names: str) -> None:
    """Raise UserError if one of the named fields is set and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")

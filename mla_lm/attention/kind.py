"""What the rest of the repository asks of a kind of attention, and what every kind has."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from mla_lm.attention.rope import YarnConfig
from mla_lm.errors import UserError


@dataclass
class SharedOptions:
    """The keys of `model.attention` that every kind reads."""

    kind: str = "mha"  # a name in mla_lm.attention.kinds.KINDS
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)


class LayerConfig(Protocol):
    """The checked sizes of one attention layer."""

    num_heads: int
    seq_len: int

    @property
    def cached_elements(self) -> int:
        """Elements that the layer's cache keeps for each token."""
        ...

    @property
    def macs_per_key(self) -> int:
        """Multiply-adds of one query and one key in all heads, without the projections: score and weighted value."""
        ...

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        ...


@dataclass(frozen=True)
class TransformersForm:
    """How a model class of `transformers` holds this attention.

    Attributes:
        architecture: the class, as config.json names it
        projections: our modules of the layer, and theirs within `self_attn`
        entries: entries of config.json, and the fields of the layer's configuration that have their values
        rotated: modules whose output has rotated rows, each head's last, which lie in pairs (2i, 2i + 1) there and as
            (i, i + D/2) here: the number of heads, and of the rows before, as fields of the configuration; None is 1
    """

    architecture: str
    projections: dict[str, str]
    entries: dict[str, str]
    rotated: dict[str, tuple[str | None, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention; each is described in its own file and named in `mla_lm.attention.kinds`.

    Attributes:
        title: in words
        options: dataclass of the keys of `model.attention` that are this kind's own
        layer_config: makes and checks a `LayerConfig`. It takes d_model, num_heads, seq_len, dropout, use_bias,
            rope_base and yarn by keyword, and every field of `options`; raises UserError for sizes that cannot be.
        layer: the module, made from that, with `out_proj`, `forward(x, cache, documents)` and `new_cache` as `MLA` has
        transformers: how `scripts.export` writes it; None: no model class of transformers can hold it
    """

    title: str
    options: type
    layer_config: Callable[..., LayerConfig]
    layer: Callable[..., nn.Module]
    transformers: TransformersForm | None = None


def check_positive(config: object, *names: str) -> None:
    """Raises UserError where one of the named fields is set and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")

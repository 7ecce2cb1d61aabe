"""The sizes of Multi-head Latent Attention, and its keys of `model.attention`; the layer is in mla.py."""

from dataclasses import dataclass, field

from mla_lm.attention.kind import DERIVED, check_positive
from mla_lm.attention.rope import YarnConfig
from mla_lm.errors import UserError

INITS = ("normal", "fan_in")


@dataclass
class MLAOptions:
    """The keys of `model.attention` that only MLA reads; see `MLAConfig`."""

    kv_compressed_dim: int | None = None
    q_compressed_dim: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    value_dim: int | None = None
    latent_norm: bool = True
    latent_scale: bool = False
    init: str = "normal"
    rope_frequencies: list[float] | None = None


@dataclass
class MLAConfig:
    """Sizes of one MLA layer, with the paper's symbols in brackets.

    `q_compressed_dim=None` projects queries straight from the input. `nope_dim` and `value_dim` default to
    `d_model // num_heads`. Where nope_dim + rope_dim == value_dim, fused attention needs no padding.

    Raises:
        UserError (a ValueError): the sizes are invalid or do not fit together.
    """

    d_model: int  # [d]
    num_heads: int  # [n_h]
    kv_compressed_dim: int  # [d_c]: width of the latent, which is cached instead of keys and values
    q_compressed_dim: int | None  # [d_c']
    rope_dim: int  # [d_h^R]: the part of each head that RoPE rotates; all heads share its key. 0: no positions
    seq_len: int  # longest sequence, in tokens
    dropout: float = 0.0  # on the layer's output; attention weights are never dropped
    use_bias: bool = False
    nope_dim: int = DERIVED  # [d_h]: the part of each query and key head without position
    value_dim: int = DERIVED  # [d_h]
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    latent_norm: bool = True  # norm of the KV latent; False for a model converted from MHA, which has none
    rope_frequencies: list[float] | None = None  # for a converted model: (rope_dim / 2,) radians per position
    latent_scale: bool = False  # multiply each normalised latent by sqrt(d_model / its width) (arXiv 2509.01322)
    init: str = "normal"  # of the up-projections: N(0, 0.02^2) as all matrices, or fan_in: N(0, 1 / the latent's width)

    def __post_init__(self):
        for name in ("kv_compressed_dim", "rope_dim"):
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing: MLA needs kv_compressed_dim and rope_dim")
        check_positive(self, "d_model", "num_heads", "kv_compressed_dim", "q_compressed_dim", "seq_len")
        check_positive(self, "nope_dim", "value_dim", "rope_base")
        self.yarn.check()
        if self.init not in INITS:
            raise UserError(f"init={self.init} is unknown: {' or '.join(INITS)}")
        if self.d_model % self.num_heads:
            raise UserError(f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}")
        if self.rope_dim % 2 or self.rope_dim < 0:
            raise UserError(f"rope_dim={self.rope_dim} must be even, as rotation works on pairs, and at least 0")
        if self.rope_frequencies is not None and len(self.rope_frequencies) != self.rope_dim // 2:
            given = len(self.rope_frequencies)
            raise UserError(f"rope_frequencies has {given} entries, but rope_dim={self.rope_dim} needs half of it")
        if self.rope_frequencies is not None and self.yarn.factor != 1:
            raise UserError(f"yarn.factor={self.yarn.factor} cannot be combined with rope_frequencies")
        if self.nope_dim is None:
            self.nope_dim = self.d_model // self.num_heads
        if self.value_dim is None:
            self.value_dim = self.d_model // self.num_heads

    @property
    def head_dim(self) -> int:
        return max(self.nope_dim + self.rope_dim, self.value_dim)

    @property
    def latent_dim(self) -> int:
        """Width of the latent that the keys and values of one head are made of."""
        return self.kv_compressed_dim

    @property
    def cached_elements(self) -> int:
        """Elements cached per token: its latent and the shared rotated key (section 2.1.4)."""
        return self.kv_compressed_dim + self.rope_dim

    @property
    def macs_per_key(self) -> int:
        return self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def macs_per_token(self) -> int:
        return 0

    @property
    def rotated_dim(self) -> int:
        return self.rope_dim

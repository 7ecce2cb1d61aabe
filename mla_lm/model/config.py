"""The sizes of a model."""

from dataclasses import dataclass, field

from mla_lm.attention import MHAConfig, MLAConfig
from mla_lm.attention.rope import YarnConfig
from mla_lm.errors import UserError


@dataclass
class AttentionConfig:
    """MLA where `kv_compressed_dim` is set, otherwise MHA, GQA or MQA by `num_kv_heads`; see MLAConfig, MHAConfig."""

    kv_compressed_dim: int | None = None
    q_compressed_dim: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    value_dim: int | None = None
    num_kv_heads: int | None = None
    rope_base: float = 10000.0
    yarn: YarnConfig = field(default_factory=YarnConfig)
    latent_norm: bool = True
    rope_frequencies: list[float] | None = None


@dataclass
class TransformerConfig:
    """Sizes of the whole model. `vocab_size` and `document_token` are filled in by train.py.

    `layer_config` raises UserError (a ValueError) for sizes that cannot be.
    """

    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    seq_len: int = 256
    ff_hidden: int = 640
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    vocab_size: int | None = None  # entries of the tokenizer
    document_token: int | None = None  # id that begins a document: attention then stays within documents
    dropout: float = 0.0
    use_bias: bool = False
    norm_eps: float = 1e-6  # of the norms on the residual stream; those on MLA's latents keep 1e-6, as DeepSeek's do
    tie_embeddings: bool = True
    activation_checkpointing: bool = False

    @property
    def attention_kind(self) -> str:
        """mla, mha, gqa or mqa."""
        if self.attention.kv_compressed_dim is not None:
            return "mla"
        return {1: "mqa", self.num_heads: "mha", None: "mha"}.get(self.attention.num_kv_heads, "gqa")

    def layer_config(self) -> MLAConfig | MHAConfig:
        """The configuration of each block's attention, checked."""
        for name in ("num_layers", "d_model", "num_heads", "seq_len", "ff_hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"model.norm_eps={self.norm_eps} must be above 0 and below 1")
        shared = {
            "d_model": self.d_model,
            "num_heads": self.num_heads,
            "seq_len": self.seq_len,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "rope_base": self.attention.rope_base,
            "yarn": self.attention.yarn,
        }
        a = self.attention
        if self.attention_kind != "mla":
            mla_alone = ("q_compressed_dim", "rope_dim", "nope_dim", "value_dim", "rope_frequencies")
            self._refuse(mla_alone, "MLA, which sets kv_compressed_dim")
            return MHAConfig(**shared, num_kv_heads=a.num_kv_heads)
        self._refuse(("num_kv_heads",), "MHA, GQA and MQA; MLA's heads share one latent of kv_compressed_dim")
        if a.rope_dim is None:
            raise UserError("model.attention.rope_dim is missing: MLA needs it beside kv_compressed_dim")
        return MLAConfig(
            **shared,
            kv_compressed_dim=a.kv_compressed_dim,
            q_compressed_dim=a.q_compressed_dim,
            rope_dim=a.rope_dim,
            nope_dim=a.nope_dim,
            value_dim=a.value_dim,
            latent_norm=a.latent_norm,
            rope_frequencies=a.rope_frequencies,
        )

    def _refuse(self, names: tuple[str, ...], owner: str) -> None:
        for name in names:
            if getattr(self.attention, name) is not None:
                raise UserError(f"model.attention.{name} is set, but belongs to {owner}")

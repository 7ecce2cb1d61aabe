"""The sizes of a model."""

from dataclasses import dataclass, field, fields

from mla_lm.attention import KINDS, AttentionConfig
from mla_lm.attention.kind import LayerConfig, SharedOptions
from mla_lm.errors import UserError
from mla_lm.keys import FROM_DATA, INCIDENTAL, marked


@dataclass
class TransformerConfig:
    """Sizes of the whole model.

    `layer_config` checks them and raises UserError (a ValueError) for invalid sizes.
    """

    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    seq_len: int = 256
    ff_hidden: int = 640
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    vocab_size: int | None = marked(None, FROM_DATA)  # number of the tokenizer's entries
    # id that begins a document; if set, attention stays within documents
    document_token: int | None = marked(None, FROM_DATA)
    dropout: float = 0.0
    use_bias: bool = False
    norm_eps: float = 1e-6  # of the norms on the residual stream; those on MLA's latents keep 1e-6, as DeepSeek's do
    tie_embeddings: bool = True
    # a new run begins with two heads that copy from the context: training calls induction.begin_with_induction
    induction_init: bool = False
    activation_checkpointing: bool = marked(False, INCIDENTAL)

    def layer_config(self) -> LayerConfig:
        """Check the sizes and return the configuration of each block's attention."""
        for name in ("num_layers", "d_model", "num_heads", "seq_len", "ff_hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"model.norm_eps={self.norm_eps} must be above 0 and below 1")
        if self.attention.kind not in KINDS:
            raise UserError(f"model.attention.kind={self.attention.kind} is unknown: one of {', '.join(KINDS)}")
        kind = KINDS[self.attention.kind]
        own = {option.name: getattr(self.attention, option.name) for option in fields(kind.options)}
        self._refuse_options_of_others(own)
        return kind.layer_config(
            d_model=self.d_model,
            num_heads=self.num_heads,
            seq_len=self.seq_len,
            dropout=self.dropout,
            use_bias=self.use_bias,
            rope_base=self.attention.rope_base,
            yarn=self.attention.yarn,
            **own,
        )

    def _refuse_options_of_others(self, own: dict) -> None:
        shared = {option.name for option in fields(SharedOptions)}
        for option in fields(AttentionConfig):
            if option.name in own or option.name in shared or getattr(self.attention, option.name) == option.default:
                continue
            owners = [name for name, kind in KINDS.items() if option.name in {o.name for o in fields(kind.options)}]
            raise UserError(
                f"model.attention.{option.name} is set, but belongs to kind {' or '.join(owners)}, "
                f"and model.attention.kind={self.attention.kind}"
            )

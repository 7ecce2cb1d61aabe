"""A decoder-only transformer, read from top to bottom: configuration, feed-forward, block, model."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mla_lm.attention import MHA, MLA, MHAConfig, MLAConfig
from mla_lm.attention.cache import ModelCache
from mla_lm.attention.documents import Documents
from mla_lm.attention.rope import YarnConfig
from mla_lm.errors import UserError
from mla_lm.linear import Linear
from mla_lm.loss import linear_cross_entropy


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


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.ff_hidden, bias=config.use_bias)
        self.up_proj = Linear(config.d_model, config.ff_hidden, bias=config.use_bias)
        self.down_proj = Linear(config.ff_hidden, config.d_model, bias=config.use_bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        layer_config = config.layer_config()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = MLA(layer_config) if isinstance(layer_config, MLAConfig) else MHA(layer_config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cache=None, documents: Documents | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache, documents)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """Embedding, blocks, norm, head.

    Raises:
        UserError (a ValueError): a configuration that cannot be.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        config.layer_config()  # checks the sizes that all blocks share
        if not config.vocab_size:
            raise UserError("vocab_size is not set: give the number of the tokenizer's entries")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal with deviation 0.02; what writes to the residual stream is scaled by its depth (GPT-2's recipe)."""
        if isinstance(module, Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block):  # apply() visits a block after its parts
            for proj in (module.attention.out_proj, module.feed_forward.down_proj):
                nn.init.normal_(proj.weight, std=0.02 / (2 * self.config.num_layers) ** 0.5)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: ModelCache | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            tokens: (B, T) ids; with a cache, those that follow what it holds, all of one document
            targets: (B, T) ids to predict, -100 where there is nothing to predict
            cache: what `new_cache` made; the tokens are appended to it
            reduction: of the loss: "mean" over predicted tokens, or "none"; unused without targets

        Returns:
            logits (B, T, vocab_size); or the loss in nats, fp32: a scalar, or (B, T) with 0 where the target is -100

        Raises:
            ValueError: more tokens than `seq_len`, or than the cache has room for.
        """
        x = self.hidden_states(tokens, cache)
        if targets is None:
            return self.head(x)
        return linear_cross_entropy(x, self.head.weight, targets, reduction)

    def hidden_states(self, tokens: Tensor, cache: ModelCache | None = None) -> Tensor:
        """What the head reads, (B, T, d_model); arguments and errors as of `forward`."""
        x = self.embedding(tokens)
        documents = None
        if self.config.document_token is not None and cache is None:
            documents = Documents.find(tokens, self.config.document_token)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, cache.layers[i])
            elif self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, None, documents, use_reentrant=False)
            else:
                x = block(x, documents=documents)
        return self.norm(x)

    @torch.no_grad()
    def prepare_decoding(self, dtype: torch.dtype, compiled: bool = False) -> "Transformer":
        """Keep the weights of matrix products as decoding reads them; for inference only. Returns this same model.

        They are in `dtype` from here on, as autocast would make them anew at every step. On a CPU in fp32 a library's
        product of one token reads a weight with more rows than columns faster along its columns; a compiled step
        (see `Linear`) does not. In both cases a head that was the embedding too is a matrix of its own afterwards.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                weight = module.weight.to(dtype)
                by_library = weight.device.type == "cpu" and dtype == torch.float32 and not compiled
                if by_library and weight.size(0) > weight.size(1):
                    weight = weight.t().contiguous().t()
                module.weight = nn.Parameter(weight, requires_grad=False)
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        return self

    def new_cache(self, batch_size: int, max_len: int | None = None, dtype: torch.dtype | None = None) -> ModelCache:
        """An empty cache for `max_len` tokens, or one that grows up to seq_len, on the weights' device.

        Args:
            dtype: the weights' unless given; int8 keeps a scale beside the values, see `LayerCache`
        """
        return ModelCache([block.attention.new_cache(batch_size, max_len, dtype) for block in self.blocks])

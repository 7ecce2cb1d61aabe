"""A decoder-only transformer."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mla_lm.attention.documents import Documents
from mla_lm.attention.kv_cache import ModelCache
from mla_lm.attention.linear import Linear
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.layers import Block
from mla_lm.model.loss import linear_cross_entropy


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

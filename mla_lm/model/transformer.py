"""A decoder-only transformer."""

from typing import cast

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
    """A decoder-only language model: embedding, blocks, norm, head.

    Raises:
        UserError (a ValueError): the configuration is invalid.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        config.layer_config()  # checks the sizes that all blocks share
        if not config.vocab_size:
            raise UserError("vocab_size is not set: give the number of the tokenizer's entries")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, 0.02^2); projections into the residual stream are scaled down by depth (GPT-2)."""
        if isinstance(module, Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block):  # apply() visits a block after its submodules
            for weight in (module.attention.out_proj.weight, module.feed_forward.down_proj.weight):
                nn.init.normal_(weight, std=0.02 / (2 * self.config.num_layers) ** 0.5)
            module.attention.init_weights()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: ModelCache | None = None,
        reduction: str = "mean",
        most_documents: int | None = None,
    ) -> Tensor:
        """Return the logits, or the loss if targets are given.

        Args:
            tokens: (B, T) ids; with a cache, they follow the tokens that it holds, and belong to the same document
            targets: (B, T) ids to predict, -100 where there is nothing to predict
            cache: a cache from `new_cache`; the tokens are appended to it
            reduction: of the loss: "mean" over predicted tokens, or "none"
            most_documents: at least as many as there are in `tokens`; without it, a model with `document_token` counts
                them, for which it waits for the device

        Returns:
            logits (B, T, vocab_size); or the loss in nats, fp32: a scalar, or (B, T) with 0 where the target is -100

        Raises:
            ValueError: there are more tokens than `seq_len`, or than the cache has room for.
        """
        x = self.hidden_states(tokens, cache, most_documents)
        if targets is None:
            return self.head(x)
        return linear_cross_entropy(x, self.head.weight, targets, reduction)

    def hidden_states(
        self, tokens: Tensor, cache: ModelCache | None = None, most_documents: int | None = None
    ) -> Tensor:
        """The hidden states that the head projects to logits, (B, T, d_model); arguments and errors as in `forward`."""
        x = self.embedding(tokens)
        documents = None
        if self.config.document_token is not None and cache is None:
            documents = Documents.find(tokens, self.config.document_token, most_documents)
        carried = None  # from each block's attention to the next
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x, carried = block(x, cache.layers[i], carried=carried)
            elif self.config.activation_checkpointing and self.training:
                x, carried = checkpoint(block, x, None, documents, carried, use_reentrant=False)
            else:
                x, carried = block(x, documents=documents, carried=carried)
        if cache is not None:
            cache.advance()
        return self.norm(x)

    def train_in_fp8(self) -> list[str]:
        """From now on compute the products of the blocks' matrices in fp8 in training mode, and nowhere else.

        The rest is to run under autocast in bf16.

        Returns:
            the names, within a block, of the matrices whose sizes do not allow it; their products stay as they are
        """
        linears = {name: module for name, module in self.blocks.named_modules() if isinstance(module, Linear)}
        for linear in linears.values():
            linear.fp8 = linear.fits_fp8
        return list(dict.fromkeys(name.split(".", 1)[1] for name, linear in linears.items() if not linear.fp8))

    @torch.no_grad()
    def prepare_decoding(self, dtype: torch.dtype, compiled: bool = False) -> "Transformer":
        """Convert the weights of matrix products for decoding, in place, and return the model; for inference only.

        The weights are cast to `dtype` once, as autocast would cast them at every step. On a CPU in fp32, a weight with
        more rows than columns is also stored by columns, from which a library computes one token's product faster; a
        compiled step (see `Linear`) does not. A head that was tied to the embedding becomes a matrix of its own.
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
        """An empty cache with room for `max_len` tokens, on the weights' device; if None, one that grows up to seq_len.

        Args:
            dtype: by default that of the weights; int8 stores scales beside the values, see `LayerCache`
        """
        return ModelCache([cast(Block, block).attention.new_cache(batch_size, max_len, dtype) for block in self.blocks])

"""Weights that begin as an induction circuit, so that a model copies from its context from the first steps on.

Where a token has occurred before, what followed it then is likely to follow again. Two heads find it (arXiv
2209.11895): one writes into the residual stream what the token before is, and one in a later layer attends to positions
whose token before is the present token. Training by itself finds the pair late, after a plateau on which the model
knows pairs of tokens and no context. Here the first heads of two layers begin as that pair; nothing holds them to it
later. Weights that begin as what training makes of them are called mimetic (arXiv 2305.09828).

With e_t the embedding of token t, and P, S, C (n, d_model) with rows of length 1, all orthogonal to one another and to
a direction u that is the same in all embeddings:

    the first layer attends by position to t - 1, and writes S^T P e_{t-1}          (1)
    the second scores position s by (P e_t) . (S x_s), and writes C^T C e_s         (2)

Through a tied head u adds the same to all logits, so it changes no probability. The equations are numbered here.
"""

from typing import cast

import torch
from torch import Tensor

from mla_lm.attention import KINDS
from mla_lm.attention.first_head import FirstHead
from mla_lm.errors import UserError
from mla_lm.model.layers import Block
from mla_lm.model.transformer import Transformer

CONSTANT = 4.0  # length of u in an embedding, in lengths of the rest; less is lost as the embeddings grow
WRITTEN = 2.2  # size of what the heads write, in sizes of the embedding
SCORE = 16.0  # of a position whose token before is the present one, less noise: 10 to 14 arrive; others have 0 +- 3
SAMPLE = (8, 64)  # sequences, and tokens of each at most, to measure sizes on


@torch.no_grad()
def begin_with_induction(model: Transformer) -> None:
    """Set the first heads of two layers of a model whose weights are newly drawn.

    Raises:
        UserError (a ValueError): the kind of attention has no such head with these sizes, or the model has too few
            layers or positions.
    """
    config = model.config
    kind = KINDS[config.attention.kind]
    if config.num_layers <= kind.period or config.seq_len < 2:
        raise UserError(
            "model.induction_init needs two positions, and two layers with keys of their own: not "
            f"seq_len={config.seq_len} and num_layers={config.num_layers}"
        )
    first, second = (cast(Block, model.blocks[index]) for index in (0, kind.period))
    n = min(first.attention.matched_dim(), (config.d_model - 1) // 3)
    if n < 1:
        raise UserError(
            f"model.induction_init=true is not made for model.attention.kind={config.attention.kind} of these sizes: "
            "a head needs dimensions that RoPE turns fast, and others that it turns slowly or not at all"
        )
    basis = torch.linalg.qr(torch.randn(config.d_model, 1 + 3 * n))[0].mT
    u, P, S, C = basis.split((1, n, n, n))
    size = model.embedding.weight.square().mean().sqrt()
    model.embedding.weight += CONSTANT * size * config.d_model**0.5 * u
    sequences, tokens = SAMPLE
    x = model.embedding(torch.randint(len(model.embedding.weight), (sequences, min(tokens, config.seq_len))))
    out = WRITTEN * size
    first.attention.set_first_head(first.attention_norm(x), FirstHead(P, out * S.mT, u))  # eq. 1
    x, carried = first(x)
    for block in list(model.blocks)[1 : kind.period]:
        x, carried = block(x, carried=carried)
    x = second.attention_norm(x)
    query, key, value = (besides_mean(rows, x) for rows in (P, S, C))
    second.attention.set_first_head(x, FirstHead(value, out * C.mT, u, (query, key), SCORE))  # eq. 2


def besides_mean(rows: Tensor, x: Tensor) -> Tensor:
    """Rows, (n, d_model), less their part along the mean of the inputs x, (B, T, d_model).

    Heads that begin at random write nearly the same at every position. Read along, it would drown what differs.
    """
    mean = x.mean((0, 1))
    return rows - torch.outer(rows @ mean, mean) / mean.square().sum()

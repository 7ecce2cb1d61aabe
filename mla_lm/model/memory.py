"""The memory that a training step takes on one device, computed without allocating it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_lm.attention import KINDS
from mla_lm.attention.sdpa import stored_scores
from mla_lm.hardware import triton_failure
from mla_lm.model.config import TransformerConfig
from mla_lm.model.loss import CHUNK_LOGITS, LEAST_ROWS
from mla_lm.model.transformer import Transformer


@dataclass
class TrainingMemory:
    """Bytes that one device holds during eager training; see `training_memory`."""

    weights: int  # in fp32, RoPE's tables included
    gradients: int  # in fp32
    optimizer_state: int  # AdamW's two moments, or one for each matrix that Muon updates
    weight_copies: int  # autocast's copies of the blocks' matrices, kept for a whole step; 0 in fp32
    loss: int  # a chunk of logits, what the loss computes from them, and its copies of the head's weight
    activations: int  # kept from the forward pass for the backward pass
    checkpointed_activations: int  # the same with activation_checkpointing
    recomputed_block: int  # one block's activations, which activation_checkpointing computes again in backward
    feed_forward_gradients: int  # of SwiGLU's product and its two factors, where backward begins

    def peak(self, checkpointing: bool, accumulation: int = 1) -> int:
        """The most bytes held at any time: in the loss, at the start of the backward pass, or at its end.

        With accumulation, the gradients of earlier micro-batches are there throughout. Without it, the backward pass
        allocates gradients while it frees activations.
        """
        if checkpointing:
            most = self.checkpointed_activations + max(self.loss, self.recomputed_block + self.feed_forward_gradients)
        else:
            most = self.activations + max(self.loss, self.feed_forward_gradients)
        most = most + self.gradients if accumulation > 1 else max(most, self.gradients)
        return self.weights + self.optimizer_state + self.weight_copies + most


def training_memory(
    config: TransformerConfig, batch_size: int, dtype: torch.dtype, device: str = "cuda", optimizer: str = "adamw"
) -> TrainingMemory:
    """Compute the memory that training takes on one device.

    Args:
        config: its activation_checkpointing is not read, as the result covers both cases
        batch_size: sequences of seq_len tokens in a micro-batch
        dtype: of autocast; fp32 means no autocast
        device: its type decides how many logits the loss computes at once, and whether attention stores scores
        optimizer: adamw or muon

    Raises:
        UserError (a ValueError): the configuration is invalid.
    """
    return _by_batch_size(config, dtype, device, optimizer)(batch_size)


def largest_batch(
    config: TransformerConfig, share: int, room: int, dtype: torch.dtype, device: str = "cuda", optimizer: str = "adamw"
) -> int:
    """The largest divisor of `share` whose sequences train at once in `room` bytes; 1 where not even one does.

    Args:
        share: sequences that one device contributes to an optimizer step
    """
    memory, checkpointing = _by_batch_size(config, dtype, device, optimizer), config.activation_checkpointing
    divisors = (size for size in range(share, 0, -1) if share % size == 0)
    return next((size for size in divisors if memory(size).peak(checkpointing, share // size) <= room), 1)


def _by_batch_size(
    config: TransformerConfig, dtype: torch.dtype, device: str, optimizer: str
) -> Callable[[int], TrainingMemory]:
    """`training_memory` as a function of the batch size, which is quick to call again."""
    with torch.device("meta"):
        model = Transformer(config)
    weights = 4 * sum(p.numel() for p in model.parameters())
    matrices, copies = _matrices(model), _copies(model, dtype)
    plain = _kept_bytes(config, dtype, checkpointing=False)
    checkpointed = _kept_bytes(config, dtype, checkpointing=True)
    # _kept_bytes runs the model as on a CPU
    scores = 0 if device == "cpu" else config.num_heads * stored_scores("cpu", dtype, config.seq_len) * dtype.itemsize

    def of(batch_size: int) -> TrainingMemory:
        kept, block = plain(batch_size)
        return TrainingMemory(
            weights=weights + sum(b.nbytes for b in model.buffers()),
            gradients=weights,
            optimizer_state=2 * weights - (4 * matrices if optimizer == "muon" else 0),
            weight_copies=copies,
            loss=_loss_bytes(model.head, batch_size * config.seq_len, dtype, device),
            activations=kept - config.num_layers * batch_size * scores,
            checkpointed_activations=checkpointed(batch_size)[0],
            recomputed_block=block - batch_size * scores,
            feed_forward_gradients=3 * batch_size * config.seq_len * config.ff_hidden * dtype.itemsize,
        )

    return of


def _matrices(model: Transformer) -> int:
    """Elements of the blocks' matrices."""
    return sum(m.weight.numel() for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear))


def _copies(model: Transformer, dtype: torch.dtype) -> int:
    """Bytes of autocast's copies of the blocks' matrices."""
    return 0 if dtype == torch.float32 else _matrices(model) * dtype.itemsize


def _kept_bytes(config: TransformerConfig, dtype: torch.dtype, checkpointing: bool) -> Callable[[int], tuple[int, int]]:
    """`_kept_bytes_of` as a function of the batch size; from two sequences on, each further one adds the same."""
    of_few = functools.cache(lambda batch_size: _kept_bytes_of(config, batch_size, dtype, checkpointing))

    def of(batch_size: int) -> tuple[int, int]:
        if batch_size <= 3:
            return of_few(batch_size)
        kept, block = (two + (batch_size - 2) * (three - two) for two, three in zip(of_few(2), of_few(3), strict=True))
        return kept, block

    return of


def _kept_bytes_of(
    config: TransformerConfig, batch_size: int, dtype: torch.dtype, checkpointing: bool
) -> tuple[int, int]:
    """Bytes that the forward pass keeps, and one block's share of them, both without autocast's copies of weights.

    The model itself runs on fake tensors, which have no data, so they cannot tell documents apart. A run with one block
    and one with one period of blocks more tell what each further block adds.
    """
    sizes, period = [], KINDS[config.attention.kind].period
    for num_layers in (1, 1 + period):
        part = replace(config, num_layers=num_layers, activation_checkpointing=checkpointing, document_token=None)
        with FakeTensorMode():
            tokens = torch.zeros(batch_size, config.seq_len, dtype=torch.long)
            model = Transformer(part)
            copies = 0 if checkpointing else _copies(model, dtype)  # a checkpoint keeps none
            sizes.append(saved_bytes(model, tokens, dtype) - copies)
    block = (sizes[1] - sizes[0]) // period
    return sizes[0] + (config.num_layers - 1) * block, block


def _loss_bytes(head: nn.Linear, tokens: int, dtype: torch.dtype, device: str) -> int:
    """The most bytes that `linear_cross_entropy` allocates at once, besides the gradients that it returns."""
    vocab_size = head.out_features
    chunk = max(LEAST_ROWS, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // vocab_size)
    logits = min(tokens, chunk) * vocab_size
    mixed = dtype != torch.float32
    matrix = head.weight.numel() * dtype.itemsize
    without_kernel = torch.cuda.is_available() and triton_failure()  # a plan for a GPU elsewhere counts on the kernel
    if device == "cuda" and not without_kernel:
        # Gradients lie in the logits' place; there are a chunk's gradient of the weight, and the padded weight.
        return logits * dtype.itemsize + 2 * matrix
    per_logit = dtype.itemsize + 4 + 4 * mixed  # the logit, its probability in fp32, and autocast: the logit cast to it
    return logits * per_logit + matrix * (2 if mixed else 1)


def saved_bytes(model: Transformer, tokens: Tensor, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of the loss keeps for the backward pass, besides parameters and buffers.

    A storage that several tensors share counts once. Autocast's copies of weights count too.

    Args:
        model: in training mode
        tokens: (B, T) ids
        dtype: of autocast; fp32 means no autocast
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        model(tokens, tokens)
    return sum(kept.values())

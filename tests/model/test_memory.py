"""Memory of a training step as planned, against what the allocator measures."""

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mla_lm import Transformer, TransformerConfig
from mla_lm.attention import KINDS
from mla_lm.model.loss import linear_cross_entropy
from mla_lm.model.memory import TrainingMemory, _kept_bytes, _kept_bytes_of, training_memory
from mla_lm.optim.optimizer import OptimizerConfig, build_optimizer
from tests.kinds import preset_of

ATTENTION = {kind: preset_of(f"{kind}_tiny").attention for kind in KINDS}
# layers, d_model, heads, seq_len, ff_hidden; vocabulary; batch
SHAPES = (((4, 96, 4, 96, 240), 500, 4), ((2, 64, 4, 128, 160), 3000, 8))


def allocations(work) -> list[int]:
    """Bytes that are held after each allocation and release of `work`, more than before it, as the allocator says."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()  # its result lives on while the profiler looks
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held.append(held[-1] + event.nbytes())
    del result
    return held


def measured(config: TransformerConfig, batch: int, dtype: torch.dtype, kind: str = "adamw") -> tuple[int, int]:
    """Bytes kept from the forward to the backward pass, and the most that a whole step holds."""
    model, tokens = Transformer(config).train(), torch.randint(config.vocab_size, (batch, config.seq_len))
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind), dtype=dtype)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def forward() -> torch.Tensor:
        with autocast:
            return model(tokens, tokens)

    def step() -> None:
        with autocast:  # for forward and backward, as Lightning has it
            model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [t for s in optimizer.state.values() for t in s.values()]
    fixed = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state))
    return allocations(forward)[-1], fixed + max(allocations(step))


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, SHAPES[0]), (torch.bfloat16, SHAPES[1])], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_within_a_tenth_of_what_is_measured(kind, dtype, shape):
    sizes, vocab_size, batch = shape
    config = TransformerConfig(*sizes, ATTENTION[kind], vocab_size=vocab_size)
    planned = training_memory(config, batch, dtype, "cpu")
    kept, peak = measured(config, batch, dtype)
    assert planned.activations + planned.weight_copies == pytest.approx(kept, rel=0.1)
    assert planned.peak(checkpointing=False) == pytest.approx(peak, rel=0.1)

    config.activation_checkpointing = True
    kept, peak = measured(config, batch, dtype)
    assert planned.checkpointed_activations == pytest.approx(kept, rel=0.1)
    assert planned.peak(checkpointing=True) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_loss_in_several_chunks(dtype):
    config = TransformerConfig(1, 64, 2, 2048, 64, vocab_size=1000)
    x, weight = (torch.randn(*shape, 64, requires_grad=True) for shape in ((1, 2048), (1000,)))
    targets = torch.randint(1000, (1, 2048))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return linear_cross_entropy(x, weight, targets)

    loss()  # the first makes the libraries' own room
    planned = training_memory(config, 1, dtype, "cpu").loss + x.nbytes + weight.nbytes  # and both gradients
    assert planned == pytest.approx(max(allocations(loss)), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_with_muon(dtype):
    sizes, vocab_size, batch = SHAPES[0]
    config = TransformerConfig(*sizes, ATTENTION["mla"], vocab_size=vocab_size)
    planned = training_memory(config, batch, dtype, "cpu", "muon")
    assert planned.peak(checkpointing=False) == pytest.approx(measured(config, batch, dtype, "muon")[1], rel=0.1)
    optimizer = build_optimizer(Transformer(config), OptimizerConfig(kind="muon"))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert planned.optimizer_state == state


def test_gradients_of_earlier_micro_batches_are_there_throughout():
    memory = TrainingMemory(10, 10, 20, 5, 7, 100, 4, recomputed_block=8, feed_forward_gradients=1)
    assert memory.peak(checkpointing=False) == 10 + 20 + 5 + 100 + 7
    assert memory.peak(checkpointing=False, accumulation=2) == 10 + 20 + 5 + 100 + 7 + 10
    assert memory.peak(checkpointing=True) == 10 + 20 + 5 + 4 + 8 + 1
    assert memory.peak(checkpointing=True, accumulation=2) == 10 + 20 + 5 + 4 + 8 + 1 + 10


@pytest.mark.parametrize("kind", KINDS)
def test_further_sequences_add_alike(kind):
    config = TransformerConfig(*SHAPES[1][0], ATTENTION[kind], vocab_size=50)
    of = _kept_bytes(config, torch.bfloat16, checkpointing=False)
    assert of(11) == _kept_bytes_of(config, 11, torch.bfloat16, checkpointing=False)


def test_documents_are_planned_for_as_one():
    config = TransformerConfig(*SHAPES[0][0], ATTENTION["mla"], vocab_size=50)
    one = training_memory(config, 2, torch.bfloat16)
    config.document_token = 0
    assert training_memory(config, 2, torch.bfloat16) == one

"""A configuration is filled in once, in a copy, and with reasons."""

from dataclasses import asdict, replace

import pytest
import torch

from mla_lm.config import MARKS, SweepJob, TrainConfig, TrainerConfig
from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.open_store import open_store
from mla_lm.data.store import TokenStore
from mla_lm.errors import UserError
from mla_lm.hardware import memory_bytes
from mla_lm.keys import flatten
from mla_lm.model.config import TransformerConfig
from mla_lm.model.memory import training_memory
from mla_lm.optim.optimizer import OptimizerConfig
from mla_lm.training.resolve import (
    CONTEXT_BYTES,
    ROOM,
    Machine,
    Resolved,
    choose_machine,
    choose_micro_batch,
    choose_tokens_per_step,
    resolve,
)
from tests.kinds import preset_of

REASONS = ["device      cpu (as configured)", "precision   32-true (as configured)"]
MACHINE = Machine("cpu", "32-true", memory_bytes(), REASONS)
SMALL = TransformerConfig(num_layers=1, d_model=32, num_heads=2, seq_len=32, ff_hidden=32)


@pytest.fixture
def config(corpus, tmp_path) -> TrainConfig:
    tokenizer = TokenizerConfig(kind="bytes")
    data = DataConfig("text", str(corpus), tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    return TrainConfig(model=SMALL, data=data, trainer=TrainerConfig(max_steps=3))


@pytest.fixture
def store(config) -> TokenStore:
    return open_store(config.data)


def test_everything_is_filled_in_and_nothing_else_changes(config, store):
    before = asdict(config)
    resolved = resolve(config, MACHINE, store)
    assert asdict(config) == before
    theirs, ours = flatten(before), flatten(asdict(resolved.config))
    changed = {key: value for key, value in ours.items() if value != theirs[key]}
    assert changed == {
        "compile": False,
        "micro_batch_tokens": 8192,
        "model.vocab_size": 257,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
    }
    assert all("filled_in" in MARKS[key] for key in changed)
    assert resolved.reasons[:2] == MACHINE.reasons
    assert resolved.reasons[2] == "micro-batch at most 8,192 tokens (the default on cpu)"
    assert resolved.reasons[3].startswith("compile     False (compiling takes about ")
    assert resolved.device == "cpu"


def test_resolving_again_changes_nothing(config, store):
    config = resolve(config, MACHINE, store).config
    again = resolve(config, MACHINE, store)
    assert again.config == config
    assert again.reasons[2:] == [
        "micro-batch at most 8,192 tokens (as configured)",
        "compile     False (as configured)",
    ]


def test_a_document_mask_needs_the_end_of_text(config, store):
    config.data.document_mask = True
    resolved = resolve(config, MACHINE, store)
    assert resolved.config.model.document_token == store.end_of_text_id
    assert resolved.config.compile is False
    assert "they have other lengths in every batch" in resolved.reasons[3]


@pytest.mark.parametrize(("key", "given"), [("vocab_size", 300), ("document_token", 0)])
def test_what_the_tokenizer_decides_cannot_be_said_otherwise(config, store, key, given):
    config.model = replace(SMALL, **{key: given})
    with pytest.raises(UserError, match=f"model.{key}={given}, but with this tokenizer"):
        resolve(config, MACHINE, store)


def label_of(resolved: Resolved) -> tuple[str | None, list[str]]:
    return resolved.config.logger.group, resolved.config.tags


def test_a_job_of_a_sweep_is_found_by_its_group_and_tag(config, store):
    config.tags = ["mine"]
    job = SweepJob(["seed=1"], "day/time", ["learning_rate"])
    assert label_of(resolve(config, MACHINE, store)) == (None, ["mine"])
    assert label_of(resolve(config, MACHINE, store, job)) == ("day/time", ["mine", "learning_rate"])
    config.logger.group = "given"
    assert label_of(resolve(config, MACHINE, store, job)) == ("given", ["mine", "learning_rate"])
    assert config.tags == ["mine"]


def test_the_machine_is_what_is_asked_for():
    machine = choose_machine(TrainerConfig(accelerator="cpu", precision="32-true"))
    assert machine == MACHINE
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        choose_machine(TrainerConfig(accelerator="cpu", precision="16-mixed"))


@pytest.mark.parametrize(("checkpointing", "document_token"), [(False, None), (True, 0)])
def test_a_micro_batch_is_as_large_as_a_gpu_holds(checkpointing, document_token):
    model = TransformerConfig(2, 64, 2, 64, 160, vocab_size=3000)
    model.activation_checkpointing, model.document_token = checkpointing, document_token
    config = TrainConfig(tokens_per_step=2 * 18 * 64, model=model, optimizer=OptimizerConfig(kind="muon"))
    config.trainer.devices = 2
    share, sizes = 18, (3, 6, 9, 18)
    peaks = {
        size: training_memory(model, size, torch.bfloat16, "cuda", "muon").peak(checkpointing, share // size)
        for size in sizes
    }
    for room in (0, peaks[6], (peaks[6] + peaks[9]) // 2, max(peaks.values())):
        memory = int(room / ROOM) + 1 + CONTEXT_BYTES
        tokens, why = choose_micro_batch(config, "cuda", "bf16-mixed", memory)
        expected = max((size for size in sizes if peaks[size] <= room), default=1)
        assert tokens == expected * 64
        part = "the whole" if expected == share else f"1/{share // expected}"
        assert why.startswith(f"{tokens:,} tokens ({part} of a step on each GPU, by the GPU's 1.0 GiB"), why
        config.micro_batch_tokens = tokens
        assert config.micro_batch_size == expected
        config.micro_batch_tokens = None


def test_a_micro_batch_is_what_is_asked_for():
    config = TrainConfig(micro_batch_tokens=1024)
    assert choose_micro_batch(config, "cuda", "bf16-mixed", 2**40) == (1024, "at most 1,024 tokens (as configured)")
    assert choose_micro_batch(TrainConfig(), "mps", "bf16-mixed", 2**40)[0] == 8192


@pytest.mark.parametrize(
    ("model", "vocab_size", "devices", "tokens"),
    [
        (preset_of("mla_tiny"), 4096, 1, 4096),  # 1.1M parameters
        (preset_of("mla_small"), 4096, 1, 8192),  # 2.6M
        (preset_of("mha_medium"), 50257, 1, 524_288),  # 124M, as nanoGPT
        (preset_of("mla_medium"), 50257, 3, 525_312),  # the nearest multiple of three windows
        (preset_of("mla_large"), 50257, 8, 1_048_576),  # 360M
        (SMALL, 257, 1, 2048),
        (replace(SMALL, seq_len=3000), 257, 2, 6000),
    ],
)
def test_a_step_is_sized_by_the_model(model, vocab_size, devices, tokens):
    config = TrainConfig(tokens_per_step=None, model=replace(model, vocab_size=vocab_size))
    config.trainer.devices = devices
    config.check()
    config.tokens_per_step, why = choose_tokens_per_step(config)
    config.check()
    assert config.tokens_per_step == tokens
    assert why.endswith(" parameters")


def test_an_open_step_is_filled_in_and_named(config, store):
    config.tokens_per_step = None
    resolved = resolve(config, MACHINE, store)
    assert resolved.config.tokens_per_step == 2048
    assert resolved.reasons[2] == f"step        2,048 tokens (for {resolved.size.parameters:,} parameters)"
    assert resolve(resolved.config, MACHINE, store).reasons[2].startswith("micro-batch")

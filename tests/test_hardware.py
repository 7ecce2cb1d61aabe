"""What the machine offers, as far as a machine without a GPU can tell."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from mla_lm import Transformer, TransformerConfig, UserError
from mla_lm.config import TrainConfig
from mla_lm.hardware import (
    choose_accelerator,
    choose_compile,
    choose_precision,
    choose_products,
    processor,
    take_own_gpu,
)
from mla_lm.training.module import LanguageModel


class FirstRankSays(SingleDeviceStrategy):
    """As on a rank that is not the first: what is broadcast comes from elsewhere."""

    def __init__(self, word: bool):
        super().__init__("cpu")
        self.word = word

    def broadcast(self, obj, src=0):
        return self.word


def module_of(compile: bool, strategy="auto") -> LanguageModel:
    model = TransformerConfig(1, 8, 2, 8, 8, vocab_size=10)
    module = LanguageModel(Transformer(model), TrainConfig(compile=compile, model=model), torch.ones(10), "")
    module.trainer = L.Trainer(accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False)
    return module


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_every_rank_compiles_if_the_first_does(own, first):
    module = module_of(own, FirstRankSays(first))
    module.setup("fit")
    assert (module.net._compiled_call_impl is not None) == first


@pytest.mark.parametrize("compiled", [True, False])
def test_one_device_compiles_as_configured_and_not_for_testing(compiled):
    module = module_of(compiled)
    module.setup("test")
    assert module.net._compiled_call_impl is None
    module.setup("fit")
    assert (module.net._compiled_call_impl is not None) == compiled


def test_evaluation_is_in_fp32_where_training_is_in_tf32():
    module, before = module_of(False), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        module.on_validation_epoch_start()
        assert torch.get_float32_matmul_precision() == "highest"
        module.totals += 1
        module.on_validation_epoch_end()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_on_a_cpu_are_of_fp32_whatever_came_before():
    torch.set_float32_matmul_precision("high")
    assert choose_products("cpu", "32-true") == ""
    assert torch.get_float32_matmul_precision() == "highest"


def test_devices_and_precisions_that_this_machine_has_not():
    with pytest.raises(UserError, match=r"trainer\.accelerator=mps: this machine has none"):
        choose_accelerator("mps")
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        choose_precision("16-mixed", "cpu")


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    """A run that would gain goes on without, one that asks for it is refused."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled, why = choose_compile(None, "cpu", 1e6)
    assert not compiled
    assert "it would pay, but torch.compile does not work: there is no C++ compiler no-such-compiler" in why
    with pytest.raises(UserError, match=r"compile=true.*no-such-compiler\n.*CXX="):
        choose_compile(True, "cpu", 1e6)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder that nobody can write to")
def test_without_a_folder_to_compile_in_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc")
    torch.compiler.reset()  # or what another test has compiled would do
    with pytest.raises(UserError, match=r"compile=true.*/proc.*\n.*TORCHINDUCTOR_CACHE_DIR="):
        choose_compile(True, "cpu", 1e6)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1000")
    with pytest.raises(UserError, match=r"LOCAL_RANK=1000, but this machine has \d+ GPUs"):
        take_own_gpu()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_the_processor_is_named_with_what_tells_its_kind():
    info = Path("/proc/cpuinfo")
    values = dict(line.split(":", 1) for line in reversed(info.read_text().splitlines()) if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    for word in (values.get("model name", ""), values.get("cpu family", ""), torch.backends.cpu.get_cpu_capability()):
        assert word in processor("cpu")

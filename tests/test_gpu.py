"""What only a CUDA device can show; each test is a process of its own, since the others hide the device."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL, rows_of, summary_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA device"),
]

SAME_LOGITS = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig

torch.backends.cuda.matmul.allow_tf32 = False
kinds = [AttentionConfig(kv_compressed_dim=32, rope_dim=16, nope_dim=16, value_dim=32)]
kinds += [AttentionConfig(num_kv_heads=n) for n in (4, 2, 1)]
for attention in kinds:
    model = Transformer(TransformerConfig(2, 128, 4, 64, 256, attention, vocab_size=100)).eval()
    tokens = torch.randint(100, (2, 64))
    with torch.no_grad():
        expected = model(tokens)
        model.cuda()
        cache = model.new_cache(2)
        decoded = torch.cat([model(tokens[:, i : i + 1].cuda(), cache=cache) for i in range(64)], 1)
        torch.testing.assert_close(model(tokens.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoded.cpu(), expected, rtol=1e-4, atol=1e-4)
"""

# Half precision goes through a kernel of its own from Ampere on, fp32 through that of the CPU's path.
DOCUMENTS_APART = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig

mla = [{"nope_dim": 16, "value_dim": 32}, {}, {"nope_dim": 4, "value_dim": 28}]  # and heads of 48 and 32, of 20 and 28
kinds = [AttentionConfig(kv_compressed_dim=32, rope_dim=16, **sizes) for sizes in mla]
kinds += [AttentionConfig(num_kv_heads=n) for n in (4, 2, 1)]
tokens = torch.randint(8, (3, 64))
for attention in kinds:
    model = Transformer(TransformerConfig(2, 128, 4, 64, 256, attention, vocab_size=100, document_token=0))
    expected = model(tokens, tokens.roll(-1))
    expected.backward()
    gradient = model.embedding.weight.grad.clone()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.05)):
        model.zero_grad()
        model.cuda()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(tokens.cuda(), tokens.roll(-1).cuda())
        loss.backward()
        torch.testing.assert_close(loss.cpu(), expected, rtol=tolerance, atol=tolerance)
        off = (model.embedding.weight.grad.cpu() - gradient).norm() / gradient.norm()
        assert off < tolerance, (attention, dtype, off)
"""


def run(*command: str, cwd=ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_logits_are_those_of_the_cpu():
    run("-c", SAME_LOGITS)


def test_documents_are_kept_apart():
    run("-c", DOCUMENTS_APART)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_training(train, tmp_path, precision, compiled):
    overrides = (f"trainer.precision={precision}", f"compile={compiled}", "trainer.accelerator=gpu")
    run(str(ROOT / "train.py"), *SMALL, *train.data, *overrides, "hydra.run.dir=run", cwd=tmp_path)
    assert summary_of(tmp_path / "run")["accelerator"] == "gpu"


@pytest.mark.parametrize(("kind", "precision"), [("muon", "bf16-mixed"), ("muon", "16-mixed"), ("adamw", "16-mixed")])
def test_resumed_training_goes_on_as_if_it_had_not_stopped(train, tmp_path, kind, precision):
    steady = ("schedule.kind=wsd", "schedule.warmup_fraction=0", "schedule.decay_fraction=0")  # whatever max_steps is
    hardware = ("trainer.accelerator=gpu", f"trainer.precision={precision}")
    begin = (str(ROOT / "train.py"), *SMALL, *train.data, f"optimizer={kind}", *steady, *hardware)
    run(*begin, "trainer.max_steps=8", "hydra.run.dir=whole", cwd=tmp_path)
    run(*begin, "trainer.max_steps=4", "hydra.run.dir=parts", cwd=tmp_path)
    run(str(ROOT / "train.py"), "ckpt_path=parts", "trainer.max_steps=8", cwd=tmp_path)
    whole, parts = (
        [row["train/loss"] for row in rows_of(tmp_path / name) if "train/loss" in row] for name in ("whole", "parts")
    )
    assert len(whole) == 8
    assert parts == pytest.approx(whole, rel=5e-3)  # sums on a GPU come in any order

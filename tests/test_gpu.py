"""What only a CUDA device can show; each test is a process of its own, since the others hide the device."""

import os
import shutil
import subprocess
import sys

import pytest

from mla_lm.runs.config_file import read_config
from tests.conftest import ROOT, SMALL, rows_of, summary_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA device"),
]

SAME_LOGITS = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig

torch.backends.cuda.matmul.allow_tf32 = False
kinds = [AttentionConfig(kind="mla", kv_compressed_dim=32, rope_dim=16, nope_dim=16, value_dim=32)]
kinds += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]
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
kinds = [AttentionConfig(kind="mla", kv_compressed_dim=32, rope_dim=16, **sizes) for sizes in mla]
kinds += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]
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

# As many documents as the CPU counts, and more, which are empty: the same result, and nothing waits for the device.
DOCUMENTS_COUNTED_BEFORE = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.data.windows import most_documents

torch.manual_seed(0)
kinds = [AttentionConfig(kind="mla", kv_compressed_dim=32, rope_dim=16, nope_dim=16, value_dim=32)]
kinds += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]
for tokens in (torch.randint(8, (4, 65)), torch.randint(1000, (4, 65)), torch.ones(4, 65, dtype=torch.int64)):
    least = most_documents(tokens, 0, 64, 4)
    inputs, targets = tokens[:, :-1].cuda(), tokens[:, 1:].cuda()
    for attention in kinds:
        model = Transformer(TransformerConfig(2, 128, 4, 64, 256, attention, vocab_size=1000, document_token=0)).cuda()

        def step(net, **counted):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = net(inputs, targets, **counted)
            loss.backward()
            return loss

        expected = step(model)
        gradient = model.embedding.weight.grad.clone()
        for net in (model, torch.compile(model)):
            for most in (least, 2 * least, 8 * least):
                step(net, most_documents=most)  # compiles, and loads libraries
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                loss = step(net, most_documents=most)
                torch.cuda.set_sync_debug_mode("default")
                torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
                off = (model.embedding.weight.grad - gradient).norm() / gradient.norm()
                assert off < 0.05, (attention, most, off)
"""

# Which kernels run: of a decoding step none of cuDNN's, which it plans anew for each length of the cache; of AdamW one,
# or in fp16, which has none, a few for all parameters.
KERNELS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.optim.optimizer import OptimizerConfig, build_optimizer

class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

kinds = [AttentionConfig(kind="mla", kv_compressed_dim=64, rope_dim=32, nope_dim=32, value_dim=64)]
kinds += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]
for attention in kinds:
    model = Transformer(TransformerConfig(2, 256, 4, 64, 256, attention, vocab_size=100)).cuda()
    tokens = torch.randint(100, (2, 9), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        cache = model.new_cache(2, dtype=torch.bfloat16)
        model(tokens, cache=cache)
        with Names() as ran:
            model(tokens[:, :1], cache=cache)
    assert any("attention" in name or name == "attend_on_gpu" for name in ran.names), ran.names
    assert not any("cudnn" in name for name in ran.names), ran.names
for kind in ("adamw", "muon"):
    for fused in (True, False):
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind), fused)
        model(tokens, tokens).backward()
        with Names() as ran:
            optimizer.step()
        assert ("_fused_adamw_" in ran.names) == fused, ran.names
        assert fused or "_foreach_addcdiv_" in ran.names, ran.names
        assert "addcdiv_" not in ran.names, ran.names
"""

LOSS = """
import torch
import torch.nn.functional as F
from mla_lm.hardware import runs_triton
from mla_lm.model.loss import linear_cross_entropy

assert runs_triton(torch.device("cuda"))
torch.manual_seed(0)
x, weight = torch.randn(3, 1000, 64, requires_grad=True), torch.randn(50257, 64, requires_grad=True)
targets = torch.randint(50257, (3, 1000)).masked_fill(torch.rand(3, 1000) < 0.1, -100)
expected = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten())
gradients = torch.autograd.grad(expected, (x, weight))
on_gpu = [t.detach().cuda().requires_grad_() for t in (x, weight)]
for dtype, tolerance in ((torch.float32, 1e-3), (torch.float16, 0.02), (torch.bfloat16, 0.02)):
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(*on_gpu, targets.cuda())
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(*on_gpu, targets.cuda()), loss.detach(), rtol=1e-3, atol=0)
    torch.testing.assert_close(loss.cpu(), expected, rtol=tolerance, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, on_gpu), gradients, strict=True):
        assert (ours.cpu() - theirs).norm() < tolerance * theirs.norm(), dtype
"""

# One query over a cache by our own kernel: at the widths and numbers of heads that models have, and in models.
DECODING_KERNEL = """
import torch
from mla_lm.attention import gpu_kernel
from mla_lm.attention.kv_cache import dequantize, quantize

torch.manual_seed(0)
shapes = [(1, 6, 576, 512), (3, 128, 576, 512), (2, 32, 416, 384), (32, 12, 288, 256), (2, 4, 80, 64)]
shapes += [(1, 64, 416, 384), (2, 8, 128, 128), (2, 5, 48, 40)]
for batch, rows, dim, value_dim in shapes:
    for keys in (1, 63, 1000, 8192):
        for dtype in (torch.bfloat16, torch.float16):
            q = (2 * dim**-0.5 * torch.randn(batch, 1, rows, dim, device="cuda")).to(dtype)
            room = torch.randn(batch, 1, keys + 7, dim, device="cuda").to(dtype)
            k, last = room[:, :, :keys], torch.tensor([keys - 1], device="cuda")
            parts = (value_dim, dim - value_dim)[: 1 + (value_dim < dim)]
            values, scales = quantize(k, parts)
            apart = torch.randn(batch, 1, keys, value_dim, device="cuda").to(dtype)
            back = dequantize(values, scales, parts, torch.float32)
            latents = (values[..., :value_dim], scales, scales[..., :1])
            calls = [(k, k[..., :value_dim], None, None, k), (k, apart, None, None, k), (values, *latents, back)]
            for key, value, key_scales, value_scales, exact in calls:
                out = gpu_kernel.attend_to_all(q, key, value, key_scales, value_scales)
                v = back[..., :value_dim] if key_scales is not None else value
                weights = (q.double() @ exact.double().mT).softmax(-1)
                off = (out - weights @ v.double()).abs()
                assert (off <= 2**-7 * (weights @ v.double().abs()) + 1e-4).all(), (dim, rows, keys, dtype, off.max())
            expected = gpu_kernel.attend_to_all(q, k, k[..., :value_dim])
            room[:, :, keys:] = float("nan")  # beyond a fixed position, nothing is read
            out = gpu_kernel.attend_to_all(q, room, room[..., :value_dim], position=last)
            torch.testing.assert_close(out, expected, rtol=2**-7, atol=0.01)
"""

DECODING = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention import gpu_kernel

calls, launch = [], gpu_kernel.split_attention
gpu_kernel.split_attention = lambda *call: calls.append(call) or launch(*call)
torch.manual_seed(0)
kinds = [AttentionConfig(kind="mla", kv_compressed_dim=64, rope_dim=16, nope_dim=16, value_dim=32)]
kinds += [AttentionConfig(kind="mqa", num_kv_heads=1)]
for attention in kinds:
    model = Transformer(TransformerConfig(2, 128, 4, 64, 256, attention, vocab_size=100)).eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "kv_down" in name or "k_proj" in name:
            weight.data *= 4  # so that attention is far from even
    tokens = torch.randint(100, (2, 64))
    with torch.no_grad():
        expected = model.cpu()(tokens)
        model.cuda()
        for compiled in (False, True):
            step = torch.compile(model, dynamic=True, fullgraph=True) if compiled else model
            for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.int8, 0.03)):
                calls.clear()
                with torch.autocast("cuda", torch.bfloat16):
                    cache = model.new_cache(2, 64, dtype=dtype)
                    logits = [model(tokens[:, :8].cuda(), cache=cache)]
                    logits += [step(tokens[:, i : i + 1].cuda(), cache=cache) for i in range(8, 64)]
                decoded = torch.cat(logits, 1).float().cpu()
                assert (decoded - expected).norm() < tolerance * expected.norm(), (attention.kind, dtype)
                assert len(calls) == 2 * 56, len(calls)  # in each layer, at each step
"""

# Products in fp8 and their gradients are those of the CPU, which imitates them; gradients of a model are near those in
# bf16. Exits with 77 where the GPU has no fp8.
FP8 = """
import sys
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention.fp8 import fp8_failure, fp8_linear

if fp8_failure("cuda"):
    sys.exit(77)
torch.manual_seed(0)
for m, n, k in ((16, 16, 16), (2048, 320, 80), (4096, 768, 2048)):
    x, weight, grad = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        factors = [t.to(device).requires_grad_() for t in (x, weight)]
        out = fp8_linear(*factors, None)
        results.append((out, *torch.autograd.grad(out, factors, grad.to(device))))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        off = (found.cpu().float() - expected.float()).norm() / expected.float().norm()
        assert off < 0.01, (m, n, k, off)

attention = AttentionConfig(kind="mla", kv_compressed_dim=32, rope_dim=16, nope_dim=16, value_dim=32)
tokens = torch.randint(100, (4, 64), device="cuda")
gradients = []
for fp8 in (False, True):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(2, 128, 4, 64, 256, attention, vocab_size=100)).cuda()
    if fp8:
        assert model.train_in_fp8() == []
    for compiled in (False, True)[: 1 + fp8]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = (torch.compile(model) if compiled else model)(tokens, tokens.roll(-1))
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
for gradient in gradients[1:]:
    assert (gradient - gradients[0]).norm() < 0.2 * gradients[0].norm()
"""

# Steps as a CUDA graph: the ids of steps that are not captured, and of none that are compiled; no wait for the GPU.
CAPTURED_STEPS = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.inference import generate as module
from mla_lm.inference.cuda_graph import CapturedStep

torch.backends.cuda.matmul.allow_tf32 = False
replays, replay = [], torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph) or replay(graph)

def drawn(model, dtype, captured, compiled=True, **options):
    module.CapturedStep = CapturedStep if captured else lambda step, device, generator: step
    generator = torch.Generator("cuda").manual_seed(7)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype != torch.float32):
        steps = module.generate(model, prompts, 20, **options, dtype=dtype, generator=generator, compiled=compiled)
        ids = [next(steps) for _ in range(3)]  # the prompts are read, a step runs, and it is captured
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if compiled else "default")
        ids += steps
        torch.cuda.set_sync_debug_mode("default")
    return torch.stack(ids), generator.get_state()

torch.manual_seed(0)
prompts = [torch.randint(100, (length,), device="cuda") for length in (9, 2, 6)]
kinds = [AttentionConfig(kind="mla", kv_compressed_dim=64, rope_dim=16, nope_dim=16, value_dim=32)]
kinds += [AttentionConfig(kind=kind, num_kv_heads=n) for kind, n in (("mha", 4), ("gqa", 2), ("mqa", 1))]
limits = {"top_k": 50, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.2}
for attention in kinds:
    config = TransformerConfig(2, 128, 4, 64, 256, attention, vocab_size=100, tie_embeddings=False)
    model = Transformer(config).eval().cuda()
    for weight in model.parameters():
        weight.data *= 1 if weight.ndim == 1 else 4  # so that ids depend on what is attended to
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        stance = "default" if (attention.kind, dtype) == ("mla", torch.bfloat16) else "force_eager"  # compiling is slow
        for options in ({"temperature": 0}, {}, limits):
            with torch.compiler.set_stance(stance):
                replays.clear()
                ids, state = drawn(model, dtype, captured=True, **options)
                assert len(replays) == len(ids) - 2 == 25, len(replays)
                expected, expected_state = drawn(model, dtype, captured=False, **options)
                assert len(replays) == 25
            assert torch.equal(ids, expected) and torch.equal(state, expected_state), (attention.kind, dtype, options)
            if dtype == torch.float32:
                plain, _ = drawn(model, dtype, captured=False, compiled=False, **options)
                assert torch.equal(ids, plain), (attention.kind, options)
"""

MEMORY_OF_THE_LOSS = """
import torch
from mla_lm import TransformerConfig
from mla_lm.model.memory import training_memory
from mla_lm.model.loss import linear_cross_entropy

config = TransformerConfig(1, 64, 2, 8192, 64, vocab_size=50257)  # four chunks
x, weight = (torch.randn(*shape, 64, device="cuda", requires_grad=True) for shape in ((1, 8192), (50257,)))
targets = torch.randint(50257, (1, 8192), device="cuda")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for _ in range(2):  # the first also makes the libraries' own room
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = linear_cross_entropy(x, weight, targets)
        held = torch.cuda.max_memory_allocated() - before
        del loss
    planned = training_memory(config, 1, dtype).loss + x.nbytes + weight.nbytes  # and both gradients
    assert abs(held / planned - 1) < 0.1, (dtype, held, planned)
"""

# A step of several micro-batches, each as large as is planned to fit: it needs no more, and not much less.
LARGEST_MICRO_BATCH = """
import torch
from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.model.memory import largest_batch
from mla_lm.optim.optimizer import OptimizerConfig, build_optimizer
from mla_lm.training.resolve import ROOM

attention = AttentionConfig(kind="mla", kv_compressed_dim=128, rope_dim=32, nope_dim=32, value_dim=64)
config, room = TransformerConfig(4, 512, 8, 1024, 1536, attention, vocab_size=50257), 6 * 2**30
size = largest_batch(config, 4096, room, torch.bfloat16, "cuda", "muon")
model = Transformer(config).cuda()
optimizer = build_optimizer(model, OptimizerConfig(kind="muon"), dtype=torch.bfloat16)
tokens = torch.randint(50257, (size, 1025), device="cuda")
for _ in range(2):
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert 0.4 * room < torch.cuda.max_memory_allocated() < room / ROOM, (size, torch.cuda.max_memory_allocated() / room)
"""


def run(*command: str, cwd=ROOT) -> str:
    """Standard output of a Python process; it skips the test by exit status 77."""
    hidden = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")  # from the other tests
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip("the GPU lacks what this tests")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def gpus() -> int:
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


def test_logits_are_those_of_the_cpu():
    run("-c", SAME_LOGITS)


def test_documents_are_kept_apart():
    run("-c", DOCUMENTS_APART)


def test_documents_are_counted_before():
    run("-c", DOCUMENTS_COUNTED_BEFORE)


def test_kernels():
    run("-c", KERNELS)


def test_the_loss_and_its_gradients_are_those_of_the_cpu():
    run("-c", LOSS)


def test_the_kernel_of_decoding():
    pytest.importorskip("triton")
    run("-c", DECODING_KERNEL)


def test_decoding_by_the_kernel():
    pytest.importorskip("triton")
    run("-c", DECODING)


def test_a_step_of_decoding_as_a_cuda_graph():
    run("-c", CAPTURED_STEPS)


def test_the_loss_takes_the_memory_that_is_planned():
    run("-c", MEMORY_OF_THE_LOSS)


def test_products_in_fp8():
    run("-c", FP8)


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_training_in_fp8_beside_bf16(train, tmp_path, compiled):
    """The loss is within 0.1 of that in bf16 at each of 60 steps."""
    hardware = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed", f"compile={compiled}")
    begin = (str(ROOT / "train.py"), *SMALL, *train.data, *hardware, "trainer.max_steps=60", "val_every_n_steps=60")
    run("-c", "import sys; from mla_lm.attention.fp8 import fp8_failure; sys.exit(77 if fp8_failure('cuda') else 0)")
    run(*begin, "hydra.run.dir=bf16", cwd=tmp_path)
    assert "fp8         products" in run(*begin, "trainer.fp8=true", "hydra.run.dir=fp8", cwd=tmp_path)
    expected, found = (
        [row["train/loss"] for row in rows_of(tmp_path / name) if "train/loss" in row] for name in ("bf16", "fp8")
    )
    assert found == pytest.approx(expected, abs=0.1)


def test_the_largest_micro_batch_fits():
    run("-c", LARGEST_MICRO_BATCH)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_training(train, tmp_path, precision, compiled):
    overrides = (f"trainer.precision={precision}", f"compile={compiled}", "trainer.accelerator=gpu")
    said = run(str(ROOT / "train.py"), *SMALL, *train.data, *overrides, "hydra.run.dir=run", cwd=tmp_path)
    if precision != "32-true":
        assert "TF32" not in said
    assert summary_of(tmp_path / "run")["accelerator"] == "gpu"
    assert read_config(tmp_path / "run" / "config.yaml").micro_batch_tokens == 256  # the whole step


def test_what_a_gpu_leaves_open(train, tmp_path):
    options = ("trainer=gpu", "trainer.accelerator=gpu", "tokens_per_step=null", "hydra.run.dir=run")
    run(str(ROOT / "train.py"), *SMALL, *train.data, *options, cwd=tmp_path)
    config = read_config(tmp_path / "run" / "config.yaml")
    assert config.tokens_per_step == config.micro_batch_tokens == 2048


@pytest.mark.parametrize(
    ("precision", "compiled"), [("bf16-mixed", "true"), ("16-mixed", "false"), ("32-true", "false")]
)
def test_training_within_documents(train, tmp_path, precision, compiled):
    overrides = (f"trainer.precision={precision}", f"compile={compiled}", "trainer.accelerator=gpu")
    masked = ("data.document_mask=true", "schedule.short_seq_len=16")
    run(str(ROOT / "train.py"), *SMALL, *train.data, *overrides, *masked, "hydra.run.dir=run", cwd=tmp_path)
    assert summary_of(tmp_path / "run")["finished"]


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


@pytest.mark.skipif(shutil.which("nvidia-smi") is None or gpus() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_losses_of_one(train, tmp_path):
    hardware = ("trainer.accelerator=gpu", "micro_batch_tokens=64")  # two micro-batches on either
    for devices in (1, 2):
        options = (*hardware, f"trainer.devices={devices}", f"hydra.run.dir=run{devices}")
        run(str(ROOT / "train.py"), *SMALL, *train.data, *options, cwd=tmp_path)
    one, two = ([row["train/loss"] for row in rows_of(tmp_path / f"run{n}") if "train/loss" in row] for n in (1, 2))
    assert two == pytest.approx(one, abs=5e-3)

"""What others have: nanoGPT, from a folder, and transformers' DeepseekV3."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mla_lm.errors import UserError
from mla_lm.hardware import inference_autocast
from mla_lm.interop.hf.config import to_json
from mla_lm.interop.hf.weights import to_transformers
from mla_lm.model.transformer import Transformer
from scripts.bench.measure import seconds_of

NANOGPT_FILES = ("model.py", "train.py", "configurator.py")
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0  # nanoGPT's, for characters


def nanogpt_folder(path: str) -> Path:
    """The folder of a clone of nanoGPT; UserError where it is none."""
    folder = Path(path).expanduser().absolute()
    for name in NANOGPT_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"--nanogpt {path} is no clone of nanoGPT: there is no {name} in it\n"
                "  git clone https://github.com/karpathy/nanoGPT makes one"
            )
    return folder


def nanogpt(folder: Path, **config: int) -> nn.Module:
    """A new GPT of nanoGPT, by default without biases and dropout, as its train.py builds it.

    Args:
        folder: its clone
        config: of its GPTConfig: n_layer, n_embd, n_head, block_size, vocab_size
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):  # it says how many parameters it has
        return module.GPT(module.GPTConfig(**{"dropout": 0.0, "bias": False, **config}))


def nanogpt_flops_per_token(model: nn.Module) -> float:
    """Of a training step, counted as `mla_lm.model.size` does."""
    config = model.config
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    keys_seen = (config.block_size + 1) / 2
    return 3 * 2 * (matrices + config.n_layer * keys_seen * 2 * config.n_embd)


def deepseek_v3(model: Transformer) -> nn.Module:
    """transformers' DeepseekV3ForCausalLM with the weights of ours, of MLA: dense, in fp32 on the CPU.

    Raises:
        UserError: transformers is not installed, or DeepseekV3 cannot be that model.
    """
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ModuleNotFoundError as error:
        raise UserError("this compares with transformers, which is not installed: pip install transformers") from error
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_json(model.config, end_of_text=0, dtype="float32")))
    theirs.load_state_dict(to_transformers(model))
    return theirs


class PeerTraining:
    """A plain training loop, as nanoGPT's is without its data and its logging.

    Args:
        model: on its device
        loss_of: the loss from the model, inputs and targets, both (B, T)
        optimizer: of the model
        flops_per_token: of a training step
        tokens: (B, T + 1), the batch of every step
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        flops_per_token: float,
        tokens: Tensor,
        precision: str,
        compiled: bool,
    ):
        self.model, self.loss_of, self.optimizer = model, loss_of, optimizer
        self.flops_per_token, self.precision = flops_per_token, precision
        self.parameters = sum(p.numel() for p in model.parameters())
        self.device = tokens.device.type
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.first_loss: float | None = None
        if compiled:
            model.compile()

    def run(self, steps: int) -> float:
        """Train, and return the seconds it took."""
        if self.first_loss is None:
            self.first_loss = self._step().item()
        return seconds_of(lambda: [self._step() for _ in range(steps)], self.device)

    def _step(self) -> Tensor:
        with inference_autocast(self.device, self.precision):
            loss = self.loss_of(self.model, self.inputs, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def nanogpt_training(folder: Path, sizes: dict[str, int], tokens: Tensor, precision: str, compiled: bool):
    """nanoGPT with its own optimizer."""
    model = nanogpt(folder, **sizes).to(tokens.device)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, tokens.device.type)
    flops = nanogpt_flops_per_token(model)
    return PeerTraining(model, lambda net, x, y: net(x, y)[1], optimizer, flops, tokens, precision, compiled)


def transformers_training(model: Transformer, flops_per_token: float, tokens: Tensor, precision: str, compiled: bool):
    """DeepseekV3 with the weights of ours, and fused AdamW."""
    theirs = deepseek_v3(model).to(tokens.device)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=tokens.device.type != "mps"
    )

    def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return net(x, labels=y, shift_labels=y, use_cache=False).loss  # its Trainer keeps no cache either

    return PeerTraining(theirs, loss_of, optimizer, flops_per_token, tokens, precision, compiled)

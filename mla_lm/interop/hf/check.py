"""Checks that transformers computes the same with an exported folder as we do with the run, in its own process."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mla_lm.errors import UserError
from mla_lm.inference.generate import generate
from mla_lm.model.transformer import Transformer

NEW_TOKENS = 64
PROMPT_TOKENS = 16
TOLERANCE = 1e-4  # nats per token, in fp32
# The program of the other process. Its arguments are the folder, a file of windows, (N, T + 1) ids with -100 after the
# end, and how many tokens to generate and to take as prompt.
THEIRS = """
import json, sys
import numpy as np, torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
windows = torch.from_numpy(np.load(sys.argv[2]))
new_tokens, prompt_tokens = int(sys.argv[3]), int(sys.argv[4])
nats = 0.0
with torch.no_grad():
    for batch in windows.split(8):
        logits = model(batch[:, :-1].clamp(min=0)).logits
        nats += cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum").item()
    prompt = windows[:1, :prompt_tokens]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1
    )
print(json.dumps({"nats": nats, "ids": out[0, prompt.shape[1] :].tolist(), "class": type(model).__name__}))
"""


def compare_with_transformers(model: Transformer, folder: Path, windows: Tensor) -> tuple[bool, str]:
    """Compare loss and greedy continuation of the run's model and of transformers' model on some text.

    Args:
        model: the run's model, in evaluation mode
        folder: the folder that `export_run` wrote for the run, in fp32
        windows: (N, T + 1) ids, -100 after the end; the first has more than PROMPT_TOKENS ids

    Returns:
        whether both agree, and a sentence with their figures

    Raises:
        UserError: transformers is not installed, or cannot use the folder.
    """
    new_tokens = min(NEW_TOKENS, model.config.seq_len - PROMPT_TOKENS)
    with torch.no_grad():
        nats = 0.0
        for batch in windows.split(8):
            logits = model(batch[:, :-1].clamp(min=0))
            nats += cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum").item()
        ids = [int(token) for token in generate(model, windows[:1, :PROMPT_TOKENS], new_tokens, temperature=0)]
    theirs = _ask_transformers(folder, windows, new_tokens)
    targets = int((windows[:, 1:] != -100).sum())
    losses = nats / targets, theirs["nats"] / targets
    same = ids == theirs["ids"]
    figures = (
        f"{theirs['class']} has loss {losses[1]:.8f}, the run {losses[0]:.8f} over {targets:,} tokens in fp32; "
        f"{'the same' if same else 'other'} {new_tokens} greedy tokens"
    )
    return same and abs(losses[0] - losses[1]) < TOLERANCE, figures


def _ask_transformers(folder: Path, windows: Tensor, new_tokens: int) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "windows.npy")
        np.save(file, windows.numpy())
        arguments = [str(folder), str(file), str(new_tokens), str(PROMPT_TOKENS)]
        process = subprocess.run([sys.executable, "-c", THEIRS, *arguments], capture_output=True, text=True)
    if "No module named 'transformers'" in process.stderr:
        raise UserError("--check needs transformers: pip install transformers")
    if process.returncode:
        raise UserError(f"transformers cannot use {folder}: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout.splitlines()[-1])

"""Say what a training run and its KV cache would take, before either is allocated.

The overrides are those of train.py. --batch and --context are those of the cache.
"""

import argparse
from pathlib import Path

import torch

from mla_lm.config import TrainConfig
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, choose_accelerator, choose_precision, memory_bytes
from mla_lm.model.memory import TrainingMemory, training_memory
from mla_lm.model.size import model_size, same_size_as
from mla_lm.runs.report import human_bytes
from mla_lm.study.compose import check_without_data, train_config
from mla_lm.terminal import cli
from mla_lm.terminal.tables import table
from mla_lm.training.resolve import choose_micro_batch, choose_tokens_per_step

CONF = Path(__file__).parents[1] / "conf"
# The attention of both: arXiv 2405.04434, section 3.1.2 and appendix B. Their feed-forward is a mixture of experts;
# ours is one SwiGLU of the width of their first block's.
EXAMPLES = """examples:
  python -m scripts.plan model=mla_small
  python -m scripts.plan model=mla_medium model.seq_len=4096 model.vocab_size=50257 --batch 8
  DeepSeek-V2-Lite's attention:
  python -m scripts.plan model=mla_large model.num_layers=27 model.d_model=2048 model.num_heads=16 \\
      model.attention.kv_compressed_dim=512 model.attention.rope_dim=64 model.attention.nope_dim=128 \\
      model.attention.value_dim=128 model.ff_hidden=10944 model.seq_len=4096 model.vocab_size=102400
  DeepSeek-V2's attention, which also compresses the queries:
  python -m scripts.plan model=mla_large model.num_layers=60 model.d_model=5120 model.num_heads=128 \\
      model.attention.kv_compressed_dim=512 model.attention.q_compressed_dim=1536 model.attention.rope_dim=64 \\
      model.attention.nope_dim=128 model.attention.value_dim=128 model.ff_hidden=12288 model.seq_len=4096 \\
      model.vocab_size=102400
"""


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m scripts.plan",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of conf/, as for train.py")
    parser.add_argument("--batch", type=int, default=1, help="sequences in the cache (default: %(default)s)")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of each sequence (default: model.seq_len)")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse()
    config = composed(args.overrides)
    context = config.model.seq_len if args.context is None else args.context
    if args.batch < 1 or context < 1:
        raise UserError(f"--batch {args.batch} and --context {context} must be at least 1")
    if context > config.model.seq_len:
        raise UserError(f"--context {context} is longer than model.seq_len={config.model.seq_len}: raise that")
    device, precision = hardware(config)
    dtype = DTYPES[precision]
    if device != "cuda" or torch.cuda.is_available():  # of another GPU nothing is known
        config.micro_batch_tokens, _ = choose_micro_batch(config, device, precision, memory_bytes(device))
    memory = training_memory(config.model, config.micro_batch_size, dtype, device, config.optimizer.kind)
    print(*model_lines(config), "", sep="\n")
    print(*training_lines(config, memory, precision, device), "", sep="\n")
    print(*cache_lines(config, args.batch, context, dtype), sep="\n")


def composed(overrides: list[str]) -> TrainConfig:
    """The configuration that train.py would train with, but for the data, which a plan does not read.

    Raises:
        UserError and Hydra's errors: what train.py would refuse, and a vocabulary that only the data could tell.
    """
    config = train_config(CONF, overrides)
    unit = config.model.seq_len * config.world_size
    if unit > 0 and (rest := (config.tokens_per_step or 0) % unit):  # a long seq_len would need it set
        config.tokens_per_step = config.step_tokens + unit - rest  # a plan need not insist
    check_without_data(config)
    if config.tokens_per_step is None:
        config.tokens_per_step, _ = choose_tokens_per_step(config)
    return config


def hardware(config: TrainConfig) -> tuple[str, str]:
    """Device type and precision to plan for: what train.py would choose here, or what is asked for, here or not."""
    wanted, precision = config.trainer.accelerator, config.trainer.precision
    if wanted == "auto":
        wanted, _ = choose_accelerator(wanted)
    device = {"gpu": "cuda"}.get(wanted, wanted)
    if precision == "auto" and device == "cuda" and not torch.cuda.is_available():
        return device, "bf16-mixed"  # what a GPU of today would take
    return device, choose_precision(precision, device)[0]


def model_lines(config: TrainConfig) -> list[str]:
    model, size = config.model, model_size(config.model, config.mean_window_length)
    return [
        f"model       {size.attention}: {model.num_layers} layers of {model.d_model}, {model.num_heads} heads, "
        f"seq_len {model.seq_len:,}, vocabulary {model.vocab_size:,}",
        f"parameters  {size.parameters:,}, without the embedding {size.non_embedding_parameters:,}",
        f"FLOPs       {size.flops_per_token / 1e6:,.1f}M per token, forward and backward",
    ]


def training_lines(config: TrainConfig, memory: TrainingMemory, precision: str, device: str) -> list[str]:
    """Memory of one device without and with activation checkpointing."""
    batch, accumulation = config.micro_batch_size, config.accumulation
    step = f"{config.step_tokens:,} tokens a step" + (f" in {accumulation} micro-batches" * (accumulation > 1))
    peaks = [memory.peak(checkpointing, accumulation) for checkpointing in (False, True)]
    rows = [
        ("weights", memory.weights, memory.weights),
        ("gradients", memory.gradients, memory.gradients),
        ("optimizer state", memory.optimizer_state, memory.optimizer_state),
        (f"weights in {_name(DTYPES[precision])}", memory.weight_copies, memory.weight_copies),
        ("activations", memory.activations, memory.checkpointed_activations),
        ("a block again", 0, memory.recomputed_block),
        ("loss", memory.loss, memory.loss),
        ("feed-forward backward", *2 * [memory.feed_forward_gradients]),
        ("most at once", *peaks),
    ]
    cells = [(name, human_bytes(plain) if plain else "-", human_bytes(kept)) for name, plain, kept in rows if kept]
    return [
        f"training on each {device} device in {precision}: {step}, {batch} x {config.model.seq_len:,} tokens at once",
        table([("", "plain", "checkpointing"), *cells]),
    ]


def cache_lines(config: TrainConfig, batch: int, context: int, dtype: torch.dtype) -> list[str]:
    """The KV cache beside that of MHA, GQA and MQA of the same num_layers, num_heads and d_model."""
    model = config.model
    rows = [("", "bytes a token", "all", "of MHA")]
    for size in same_size_as(model):
        per_token = size.cache_bytes_per_token(model.num_layers, dtype)
        share = size.cache_elements_per_token_per_layer / (2 * model.d_model)
        mark = ">" if size.attention == model.attention.kind else " "
        total = human_bytes(batch * context * per_token)
        rows.append((f"{mark} {size.attention}", f"{per_token:,}", total, f"{share:.3f}"))
    return [
        f"KV cache of {batch:,} x {context:,} tokens in {_name(dtype)}",
        table(rows),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    cli.run(main, TrainConfig)

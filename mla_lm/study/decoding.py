"""How a row decodes: its speed over growing contexts, and what it continues prompts with."""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from mla_lm.config import TrainConfig
from mla_lm.errors import UserError
from mla_lm.hardware import DTYPES, choose_accelerator, inference_autocast, synchronize
from mla_lm.inference.generate import generate
from mla_lm.inference.streaming import Decoding as Continuing
from mla_lm.inference.streaming import in_turns
from mla_lm.model.transformer import Transformer
from mla_lm.runs.folder import RunFolder
from mla_lm.runs.load import load_run
from mla_lm.study.collect import Run
from mla_lm.study.result import Decoding, Row, Sample

CONTEXTS = (256, 1024, 4096, 16384)  # cached tokens; beyond what small models are trained on, as there caches matter
STEPS = 32  # that are timed
READ = 16  # tokens that are really read into a cache
TOKENS = 64  # of a sample
DOCUMENT = "\n"  # the prompt of runs whose data.prompts is empty


def add_decoding(row: Row, run: Run) -> None:
    """Set a row's decoding speeds and greedy samples, by one of its runs; its notes say if there are no samples."""
    try:
        row.samples = greedy_samples(run.folder)
    except UserError as error:
        row.notes.append(f"no samples: {str(error).splitlines()[0]}")
    row.decoding = decoding_speeds(run.config)


@torch.no_grad()
def decoding_speeds(config: TrainConfig, contexts: Sequence[int] = CONTEXTS) -> list[Decoding]:
    """Measure greedy decoding of one sequence by a model of a run's shape, in the run's precision.

    Its weights and most of its cache are random, and its seq_len fits the context: the speed is that of a trained
    model, also at contexts that the run was not trained for. A rate is that of the median step.
    """
    device, _ = choose_accelerator("auto")
    return [_decoding_speed(config, context, device) for context in contexts]


def _decoding_speed(config: TrainConfig, context: int, device: str) -> Decoding:
    precision = config.trainer.precision
    dtype = DTYPES[precision]
    end = context + STEPS + 2  # the last token of the prompt, and a step that is not timed
    net = Transformer(replace(config.model, seq_len=end)).to(device).eval().prepare_decoding(dtype)
    tokens = torch.zeros(1, context + 1, dtype=torch.long, device=device)
    cache = net.new_cache(1, end, dtype)
    with inference_autocast(device, precision):
        net.hidden_states(tokens[:, : min(READ, context)], cache)
        for layer in cache.layers:
            for tensor in layer.tensors:
                tensor[:, :, READ:context].normal_()
            layer.length = context
        steps = generate(net, tokens, STEPS + 1, temperature=0, cache=cache)
        next(steps)  # the first one allocates
        seconds = []
        for _ in range(STEPS):
            synchronize(device)
            start = time.perf_counter()
            next(steps)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return Decoding(context, 1 / median(seconds), net.new_cache(1, context, dtype).nbytes)


def greedy_samples(run: RunFolder, prompts: Sequence[str] = (), max_tokens: int = TOKENS) -> list[Sample]:
    """Continue prompts with a run's best checkpoint, always with the likeliest token.

    Args:
        prompts: by default the run's data.prompts

    Raises:
        UserError: the run cannot be loaded, or a prompt is empty or too long for it.
    """
    device, _ = choose_accelerator("auto")
    model, tokenizer, config = load_run(run.path, device)
    texts = list(prompts) or [prompt for prompt in config.data.prompts if prompt] or [DOCUMENT]
    model.prepare_decoding(DTYPES[config.trainer.precision])
    generator = torch.Generator(device)  # which nothing is drawn from
    decoding = Continuing((model, tokenizer, config), texts, max_tokens, [], generator, temperature=0)
    for _ in in_turns(decoding):
        pass
    return [
        Sample(prompt, text.settled[text.prompt_length :]) for prompt, text in zip(texts, decoding.texts, strict=True)
    ]

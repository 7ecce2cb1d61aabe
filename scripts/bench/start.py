"""How long a run takes to begin."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mla_lm.errors import UserError
from scripts.bench import measure

DESCRIPTION = """Seconds from the start of train.py's process to the end of its first optimizer step, not compiled.

The last column leaves out what `import torch, lightning` takes in a process of its own. The first step's end is when
its row is in metrics.jsonl. The token cache is filled before. "heavy" are packages that train.py imported beyond those
that torch and lightning import themselves. With --compile also the first step of a compiled run, where the folder that
torch keeps compiled code in is empty and where an equal run has filled it.
"""
ROOT = Path(__file__).parents[2]
# Packages that take long to import and that a run without a logger has no use for.
HEAVY = (
    "datasets", "pyarrow", "pandas", "wandb", "tensorboard", "vl_convert", "transformers", "scipy", "sklearn", "optuna",
    "requests", "aiohttp", "huggingface_hub", "lm_eval", "vllm", "torch._inductor", "torch.testing", "torchvision",
)  # fmt: skip
IMPORTS = "import torch, lightning"
# Runs train.py, and writes which modules it loaded beyond those of IMPORTS.
LISTING = f"""
import atexit, json, pathlib, runpy, sys
{IMPORTS}
before = set(sys.modules)
sys.path[0], out, sys.argv = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
atexit.register(lambda: out.write_text(json.dumps(sorted(set(sys.modules) - before))))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loggers",
        type=lambda text: text.split(","),
        metavar="NAME[,NAME]",
        default=["none", "wandb"],
        help="default: none,wandb",
    )
    parser.add_argument("--compile", action="store_true", help="also with compiling, cold and warm")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of conf/, as for train.py")
    measure.add_repeats(parser)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    first_step("none", args.overrides)  # fills the token cache
    heavy = {logger: heavy_imports(logger, args.overrides) for logger in args.loggers}
    turns = {logger: lambda logger=logger: first_step(logger, args.overrides) for logger in args.loggers}
    turns = {IMPORTS: import_seconds, **turns}
    with tempfile.TemporaryDirectory() as folder:
        if args.compile:
            turns |= {"none, compiled, cold": lambda: compiled_step(args.overrides, tempfile.mkdtemp(dir=folder))}
            turns |= {"none, compiled, warm": lambda: compiled_step(args.overrides, f"{folder}/warm")}
        seconds = measure.interleaved(turns, args.repeats)
    rows = [
        {
            "what": what,
            "seconds": median(figures),
            "beyond imports": median(a - b for a, b in zip(figures, seconds[IMPORTS], strict=True)),
            "heavy": " ".join(heavy.get(what, [])) or None,
        }
        for what, figures in seconds.items()
    ]
    for row in rows[1:]:
        row["what"] = f"first step, logger={row['what']}"
    return {
        "tokens_per_second": None,
        "model_flops_utilization": None,
        "ratios": {"imports": [measure.median_ratio(seconds[logger], seconds[IMPORTS]) for logger in args.loggers]},
        "heavy": heavy,
        "rows": rows,
    }


def import_seconds() -> float:
    """Of importing torch and lightning in a new process."""
    return measure.seconds_of(lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True))


def heavy_imports(logger: str, overrides: list[str]) -> list[str]:
    """Those of HEAVY that a run loads, and torch and lightning do not; UserError where the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "modules.json")
        first_step(logger, overrides, "-c", LISTING, str(ROOT), str(out))
        modules = json.loads(out.read_text())
    return [name for name in HEAVY if name in modules]


def compiled_step(overrides: list[str], cache: str) -> float:
    """`first_step` of a compiled run that finds torch's compiled code in a folder, and leaves it there."""
    return first_step("none", [*overrides, "compile=true"], TORCHINDUCTOR_CACHE_DIR=cache)


def first_step(logger: str, overrides: list[str], *python_arguments: str, **environment: str) -> float:
    """Seconds until train.py has logged its first step; it is stopped then.

    Raises:
        UserError: the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics, errors = Path(folder, "run", "metrics.jsonl"), Path(folder, "errors")
        ours = ["compile=false", "log_every_n_steps=1", *overrides, f"logger={logger}", f"hydra.run.dir={folder}/run"]
        began = time.perf_counter()
        with errors.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *python_arguments, str(ROOT / "train.py"), *ours],
                env={**os.environ, "WANDB_MODE": "offline", **environment}, stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip
        while not (metrics.is_file() and '"train/loss"' in metrics.read_text()):
            if process.poll() is not None:
                raise UserError(f"train.py failed: {errors.read_text().strip()[-300:]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        process.terminate()  # it saves and ends
        process.wait()
        return seconds

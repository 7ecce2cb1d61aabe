"""Memory, file descriptors and threads of a long run."""

import os
import time
from pathlib import Path
from random import Random
from statistics import median

from scripts.soak.programs import Program
from scripts.soak.runs import new_run, steps_done
from scripts.soak.trials import Row

TEST = "memory, file descriptors and threads of a long run, saved every 20 and validated every 50 steps"
STEPS = 2000
MOST_GROWTH = 4 * 2**20  # bytes, from the end of the first half to the end of the second


def soak(root: Path, folder: Path, quick: bool, random: Random) -> Row:
    steps = STEPS // 10 if quick else STEPS
    folder.mkdir()
    often = ("checkpoint.every_n_steps=20", "val_every_n_steps=50")
    process = Program("train.py", new_run(root, f"trainer.max_steps={steps}", *often), folder)
    seen: list[tuple[int, int, int, int]] = []
    while process.running:
        if (step := steps_done(folder / "run")) and step < steps:
            seen.append((step, *usage(process.process.pid)))
        time.sleep(0.05)
    process.expect(0)
    ends = [[figures for step, *figures in seen if 0.8 * end < step <= end] for end in (steps / 2, steps)]
    memory = [median(figures[0] for figures in end) for end in ends]
    # The fewest, as a look may fall into a save, which holds a file open.
    files = [min(figures[1] for figures in end) for end in ends]
    threads = [min(figures[2] for figures in end) for end in ends]
    growth = memory[1] - memory[0]
    figure = (
        f"after {steps // 2:,} of {steps:,} steps {memory[0] / 2**20:.1f} MiB, {files[0]} files, {threads[0]} threads; "
        f"at the end {memory[1] / 2**20:.1f} MiB ({growth / 2**20:+.1f}, bound {MOST_GROWTH / 2**20:.0f}), "
        f"{files[1]} files, {threads[1]} threads"
    )
    grown = growth > MOST_GROWTH or files[1] > files[0] or threads[1] > threads[0]
    return Row(figure, [f"it grows: {figure}\n    files: {folder}"] if grown else [])


def usage(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open file descriptors and threads."""
    proc = Path(f"/proc/{pid}")
    resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))

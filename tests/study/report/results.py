"""Results as a study fills them, of numbers drawn from a seed."""

import random
from math import exp, log
from statistics import mean, stdev

from mla_lm.study.result import Curve, Decoding, Estimate, Result, Row, Sample
from mla_lm.study.scaling import fits_of

KINDS = {"mla": 640, "mha": 3072, "gqa": 1536, "mqa": 768}  # bytes of cache per token
LEVEL = {"mla": 3.26, "mha": 3.28, "gqa": 3.275, "mqa": 3.32}
PARAMETERS = {"tiny": 0.16, "small": 1, "medium": 3.9}  # of small's; about a power law
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of the 95% interval, by the number of values
EVIL = "</script><script>alert(1)</script><!-- \x1b[31m & \N{RIGHT-TO-LEFT OVERRIDE}é"
PROMPTS = ("def main():", "class ")


def estimate(values: list[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(values, mean(values))
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return Estimate(values, mean(values), mean(values) - half, mean(values) + half)


def a_result(
    kinds: tuple[str, ...] = tuple(KINDS), seeds: int = 5, sizes: tuple[str, ...] = ("small",), seed=0
) -> Result:
    """A study of several kinds, each row but MHA's with a paired difference to MHA's row of its size."""
    draw = random.Random(seed)
    rows = [a_row(kind, size, list(range(1, seeds + 1)), draw) for size in sizes for kind in kinds]
    by_name = {row.name: row for row in rows}
    for row in rows:
        base = by_name.get(row.name.replace(row.kind, "mha"))
        if base and base is not row:
            pairs = zip(row.estimates["test_loss"].values, base.estimates["test_loss"].values, strict=True)
            row.difference, row.baseline = estimate([a - b for a, b in pairs]), base.name
    return Result(
        title="Attention",
        command="python -m scripts.study attention",
        date="2026-11-27",
        rows=rows,
        views={"parameters": [row.name for row in rows]},
        corpus={"f65d477a7caada0ece10d2152587c1e6": "sources of Python 3.11's standard library, BPE of 4,096 tokens"},
        machine={"processor": "AMD EPYC 9B45", "threads": 2, "torch": "2.13.0"},
        configs={row.name: f"seed: 1\nmodel:\n  attention:\n    kind: {row.kind}\n" for row in rows},
        fits=fits_of(rows),
    )


def a_row(kind: str, size: str, seeds: list[int], draw: random.Random) -> Row:
    scale = {"tiny": 1.25, "small": 1.0, "medium": 0.85}[size]
    level = LEVEL.get(kind, 3.3) * scale
    losses = [draw.gauss(level, 0.008) for _ in seeds]
    steps = list(range(300, 3601, 300))
    curve = [estimate([loss + 2.5 * exp(-step / 700) + draw.gauss(0, 0.02) for loss in losses]) for step in steps]
    cache = KINDS.get(kind, 1024)
    figures = {
        "parameters": int(draw.randint(2_580_000, 2_600_000) * PARAMETERS[size]),
        "flops_per_token": 18.1e6 if kind == "mla" else 17.4e6,
        "cache_bytes_per_token": cache,
        "cache_vs_mha": cache / 3072,
        "tokens_seen": 7_372_800,
        "lr": 0.003,
    }
    estimates = {}
    for split, offset in (("val", 0.2), ("test", 0.0)):
        values = [loss + offset for loss in losses]
        estimates[f"{split}_loss"] = estimate(values)
        estimates[f"{split}_perplexity"] = estimate([exp(value) for value in values])
        estimates[f"{split}_bits_per_byte"] = estimate([value / log(2) / 3.9 for value in values])
    estimates["tokens_per_second"] = estimate([draw.gauss(14_000, 300) for _ in seeds])
    estimates["peak_memory_bytes"] = estimate([draw.gauss(1.0e9, 1e7) for _ in seeds])
    return Row(
        name=f"{kind}_{size}",
        kind=kind,
        size=size,
        runs=[f"multirun/{kind}_{size}/{seed}" for seed in seeds],
        seeds=seeds,
        figures=figures,
        estimates=estimates,
        curve=Curve(
            tokens=[step * 2048 for step in steps],
            seconds=[step * 0.146 for step in steps],
            flops=[step * 2048 * figures["flops_per_token"] for step in steps],
            loss=curve,
            bits_per_byte=[
                Estimate([v / 2.7 for v in e.values], e.mean / 2.7, e.low and e.low / 2.7, e.high and e.high / 2.7)
                for e in curve
            ],
        ),
        position=[level + 4 * exp(-position / 20) + draw.gauss(0, 0.03) for position in range(256)],
        decoding=[
            Decoding(context, 900 / (1 + context * cache / 4e6), context * cache)
            for context in (256, 1024, 4096, 16384)
        ],
        samples=[
            Sample(prompt, f"\n    {kind} = [value for value in {kind}]\n    return {kind}\n") for prompt in PROMPTS
        ],
        tried={"0.0015": level + 0.03, "0.003": level, "0.006": level + 0.05},
    )


def unusual() -> dict[str, Result]:
    """Results that lack something, have much of it, or texts that would break a page."""
    bare = a_result(("mla",), seeds=1)
    for row in bare.rows:
        row.curve, row.position, row.decoding, row.samples, row.tried = None, [], [], [], {}
    failed = a_result(())
    failed.failed = ["mla_small, seed 3: killed at step 200"]
    evil = a_result(("mla", "mha"), seeds=2)
    evil.title = evil.command = EVIL
    evil.rows[0].name, evil.rows[1].name, evil.rows[0].baseline = EVIL, EVIL + "2", EVIL + "2"
    evil.rows[0].samples = [Sample(EVIL, EVIL)]
    evil.failed = [EVIL]
    many = a_result(sizes=("tiny", "small", "medium"))
    for number, row in enumerate(many.rows):
        row.name = f"{row.name}, model.attention.kv_compressed_dim={number}"
        row.baseline = row.difference = None
    many.fits = fits_of(many.rows)
    return {"one bare row": bare, "all failed": failed, "markup in texts": evil, "many rows with long names": many}


UNUSUAL = unusual()

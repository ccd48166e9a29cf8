"""hornet-lit bench: speed and memory of networks on this machine: a table, bench.json and, for a sweep, bench.png."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hornet_lit import __version__
from hornet_lit.cli_errors import UserError, telling
from hornet_lit.cli_parts import OptionParser, progress_bar

if TYPE_CHECKING:
    from hornet_lit.bench import Result

EXAMPLE = "hornet-lit bench hornet_tiny_7x7 --against convnext_tiny"


def run(words: list[str]) -> None:
    """Runs `bench` with the options ``words``; UserError for what the user can mend."""
    options = _parser().parse_args(words)
    threads = [] if options.threads is None else [options.threads]
    counts = {"size": options.size, "batch": options.batch, "repeats": [options.repeats], "threads": threads}
    for name, given in counts.items():
        if (least := min(given, default=1)) < 1:
            raise UserError(f"--{name} must be positive, got {least}")
    output = Path(options.output)
    if output.is_file():
        raise UserError(f"--output {output} is a file\nname a folder for bench.json and bench.png")
    known = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not os.access(known, os.W_OK):  # said before minutes of measuring
        raise UserError(f"--output {output}: {known} cannot be written to\nname another folder")
    with telling(constructing=True):
        _bench(options, output)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="hornet-lit bench",
        description="Images per second, memory and floating-point operations of networks on random images. All "
        "networks and a plain matrix product take turns; medians are shown with their range. 'of product' is the "
        "share of the matrix product's rate.",
        epilog=f"example: {EXAMPLE} --size 224 384 --precision bf16-mixed",
        allow_abbrev=False,
    )
    parser.add_argument("network", metavar="NETWORK", help="a name registered with timm, such as hornet_tiny_7x7")
    parser.add_argument("--against", metavar="NAME", nargs="+", default=[], help="networks to take turns with")
    parser.add_argument("--step", choices=("both", "infer", "train"), default="both", help="default: both")
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="side of the images (224); several: a sweep")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="images a step (8); several: a sweep")
    parser.add_argument("--precision", choices=("32", "bf16-mixed", "bf16"), default="32", help="default: 32")
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--compile", choices=("none", "default", "reduce-overhead", "max-autotune"), default="none")
    parser.add_argument("--repeats", type=int, default=7, help="turns (7)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--output", default="bench", help="folder for bench.json and bench.png (./bench)")
    return parser


def _bench(options: argparse.Namespace, output: Path) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts the memory, would write to stderr
    import torch

    from hornet_lit import bench

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here\nleave --device out, or give cpu")
    device = torch.device("cuda" if on_cuda else "cpu")
    names = list(dict.fromkeys([options.network, *options.against]))
    steps = bench.STEPS if options.step == "both" else (options.step,)
    groups = [
        [
            bench.Setting(
                network=name,
                step=step,
                size=size,
                batch=batch,
                precision=options.precision,
                channels_last=options.layout == "channels_last",
                compile=options.compile,
            )
            for name in names
        ]
        for step, size, batch in itertools.product(steps, options.size, options.batch)
    ]
    results: list[Result] = []
    with progress_bar("measuring", len(groups) * (len(names) + 1) * options.repeats) as advance:
        for settings in groups:
            results += bench.measure(settings, device=device, repeats=options.repeats, turn_done=lambda: advance(1))
    about = {"hornet_lit": __version__, **bench.machine(device), "repeats": options.repeats}
    print(table(results, machine=about))
    output.mkdir(parents=True, exist_ok=True)
    written = output / "bench.json"
    contents = {"machine": about, "results": [result.plain() for result in results]}
    written.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    print(f"\n{written}")
    if len(groups) > len(steps):
        from hornet_lit.writers.bench_drawing import draw_sweep

        over = "size" if len(options.size) > 1 else "batch"
        draw_sweep([result.plain() for result in results], over=over, picture=output / "bench.png")
        print(output / "bench.png")


def table(results: Sequence[Result], *, machine: dict[str, object]) -> str:
    """One line per result, and what was the same for all."""
    head = ("step", "size", "batch", "network", "img/s", "range", "against", "GFLOP/img", "of product")
    rows = [(*head, "peak MiB", "saved MiB/img")]
    first: dict[tuple[str, int, int], Result] = {}
    for result in results:
        s = result.setting
        base = first.setdefault((s.step, s.size, s.batch), result)
        low, high = s.batch / max(result.times), s.batch / min(result.times)
        rows.append(
            (
                s.step,
                str(s.size),
                str(s.batch),
                s.network,
                f"{result.images_per_second:.1f}",
                f"{low:.1f}–{high:.1f}",
                f"{ratio(base, result):.2f}×" if result is not base else "",
                f"{result.gflops:.2f}",
                f"{100 * result.share:.0f} %",
                f"{result.peak_bytes / 2**20:.0f}",
                "" if result.saved_bytes is None else f"{result.saved_bytes / 2**20:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in (0, 3) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    s = results[0].setting
    layout = "channels-last" if s.channels_last else "contiguous"
    rates = statistics.median(result.product_rate for result in results)
    notes = f"{s.precision}, {layout}, compile {s.compile}, medians of {machine['repeats']} turns; "
    notes += f"best matrix product {rates:.0f} GFLOP/s in {results[0].product_type}; "
    notes += f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    return "\n".join([*(line.rstrip() for line in lines), notes])


def ratio(base: Result, other: Result) -> float:
    """How many times as fast ``base`` is: the median over the turns, of which each compares neighbours in time."""
    return statistics.median(b / a for a, b in zip(base.times, other.times, strict=True))

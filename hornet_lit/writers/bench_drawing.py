"""The picture of a sweep of `hornet-lit bench`: throughput over the size of the images or of the batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import BLUE, GREEN, GREY, ORANGE, RED, save_picture

COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
TITLES = {"infer": "inference", "train": "training step"}


def draw_sweep(results: Sequence[dict[str, Any]], *, over: str, picture: Path) -> None:
    """Draws a panel per step, a line per network (and per batch, in a sweep over both), the range of its turns shaded.

    Args:
        results: as in bench.json.
        over: "size" or "batch", the horizontal axis.
        picture: PNG file to write.
    """
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(result["setting"]["step"] for result in results))
    other = "batch" if over == "size" else "size"
    several = len({result["setting"][other] for result in results}) > 1
    figure = Figure(figsize=(6 * len(steps), 4.2), layout="constrained")
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            setting = result["setting"]
            if setting["step"] == step:
                name = setting["network"] + (f", {other} {setting[other]}" if several else "")
                lines.setdefault(name, []).append(result)
        for number, (name, points) in enumerate(lines.items()):
            points = sorted(points, key=lambda point: point["setting"][over])
            x = [point["setting"][over] for point in points]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(x, [point["images_per_second"] for point in points], "o-", color=colour, label=name)
            low = [point["setting"]["batch"] / max(point["times"]) for point in points]
            high = [point["setting"]["batch"] / min(point["times"]) for point in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=TITLES[step], xlabel="side of the images" if over == "size" else "batch", ylabel="images/s")
        axes.set_xticks(sorted({result["setting"][over] for result in results}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_picture(figure, picture)

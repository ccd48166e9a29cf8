"""The drawing behind the callbacks: functions from a metrics.csv, or from a few images, to a PNG file.

Usable without a trainer: `draw_curves(metrics=Path("metrics.csv"), picture=Path("curves.png"))`.

Shape legend: C channels, H × W pixels.
"""

import csv
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .names import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9730d", "#1a7f37", "#c2202b", "#6b7280"
SMOOTH_FROM = 100  # points from which a noisy curve gets a running mean
COLUMNS = 8  # images in a row of the sheet
LABEL_LETTERS = 14  # of a class name fit under an image
SMALL = 64  # pixels: a smaller image is drawn with sharp pixels instead of a blur


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image and what the network says of it. `position` counts the images seen, padding left out."""

    position: int
    pixels_HWC: np.ndarray  # uint8, C is 1 or 3
    label: int
    predicted: int
    probability: float  # of the predicted class
    probability_of_label: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric at the steps where it was logged, in order; values that are not finite are left out."""

    steps: np.ndarray  # optimizer steps, from 0
    values: np.ndarray


def read_metrics(metrics: Path) -> tuple[dict[str, Curve], float | None]:
    """Read a CSVLogger's metrics.csv: the curves by name, and the optimizer steps per epoch (None if not logged).

    Rows of a step that comes twice, after a resume, are replaced by the later ones.
    """
    points: dict[str, dict[int, float]] = {}
    steps_per_epoch: float | None = None
    with open(metrics, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(float(row["step"]))
            for name, text in row.items():
                if text and name not in ("step", "epoch"):
                    points.setdefault(name, {})[step] = float(text)
            if row.get("epoch"):
                # step s of epoch e means s + 1 <= (e + 1) × steps: exact at an epoch's last step, where validation logs
                at_least = (step + 1) / (int(float(row["epoch"])) + 1)
                steps_per_epoch = max(at_least, steps_per_epoch or 0.0)
    curves = {}
    for name, values in points.items():
        finite = sorted((step, value) for step, value in values.items() if math.isfinite(value))
        if finite:
            steps, heights = zip(*finite, strict=True)
            curves[name] = Curve(steps=np.array(steps), values=np.array(heights))
    return curves, steps_per_epoch


def draw_curves(*, metrics: Path, picture: Path) -> bool:
    """Draw loss, top-1, learning rate and gradient norm of a metrics.csv; False, and no picture, if it has none."""
    curves, steps_per_epoch = read_metrics(metrics)
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        if name not in curves and f"{name}_step" in curves:  # Lightning's name where both step and epoch are logged
            curves[name] = curves[f"{name}_step"]
    panels = [(title, draw) for title, names, draw in _PANELS if any(name in curves for name in names)]
    if not panels:
        return False

    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.4 * rows + 0.4), dpi=120, layout="constrained")
    figure.suptitle("/".join(picture.resolve().parent.parts[-2:]), fontsize=10, color=GREY, parse_math=False)
    last_step = max(curve.steps[-1] for curve in curves.values())
    # less than an epoch has no epochs worth an axis
    per_epoch = steps_per_epoch if steps_per_epoch and last_step + 1 > steps_per_epoch else None
    for place, (title, draw) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        draw(axes, curves, per_epoch or 1.0)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(f"epoch ({per_epoch:.0f} steps each)" if per_epoch else "optimizer step")
        axes.set_xlim(left=0)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, framealpha=0.85)
    save_picture(figure, picture)
    return True


def draw_sheet(
    *,
    picture: Path,
    title: str,
    spread: Sequence[Shown],
    mistakes: Sequence[Shown],
    class_names: Sequence[str] | None,
) -> None:
    """Draw an even spread of images and, below it, the most confident mistakes."""
    from matplotlib.figure import Figure

    sections = [("An even spread over the set", spread), ("Mistakes, the most confident first", mistakes)]
    sections = [(heading, images) for heading, images in sections if images]
    columns = COLUMNS  # also for a few images: the title needs the width
    cell, text, gap, head = 1.0, 0.42, 0.10, 0.42  # in widths of an image
    height = sum(head + math.ceil(len(images) / columns) * (cell + text) for _, images in sections) + 0.4
    width = columns * (cell + gap) + gap
    inch = 1.36
    figure = Figure(figsize=(width * inch, height * inch), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y = 0.3
    axes.text(gap, y, title, fontsize=13, fontweight="bold", va="center", parse_math=False)
    for heading, images in sections:
        y += head
        axes.text(gap, y - 0.1, heading, fontsize=10.5, color=GREY, va="center", parse_math=False)
        y += 0.06
        for place, shown in enumerate(images):
            left, top = gap + (place % columns) * (cell + gap), y + (place // columns) * (cell + text)
            _draw_image(axes, shown=shown, left=left, top=top, class_names=class_names)
        y += math.ceil(len(images) / columns) * (cell + text) - 0.06
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    save_picture(figure, picture)


def _draw_image(axes: "Axes", *, shown: Shown, left: float, top: float, class_names: Sequence[str] | None) -> None:
    from matplotlib.patches import Rectangle

    h, w, channels = shown.pixels_HWC.shape
    scale = max(h, w)
    x0, y0 = left + (1 - w / scale) / 2, top + (1 - h / scale) / 2
    axes.imshow(
        shown.pixels_HWC if channels == 3 else shown.pixels_HWC.repeat(3, axis=2),  # exact, as a colour map is not
        extent=(x0, x0 + w / scale, y0 + h / scale, y0),
        interpolation="nearest" if scale < SMALL else "antialiased",
        aspect="auto",
    )
    right = shown.predicted == shown.label
    colour = GREEN if right else RED
    axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=colour, linewidth=1.2 if right else 2.4))

    said, true = (
        short_name(number=number, class_names=class_names, letters=LABEL_LETTERS)
        for number in (shown.predicted, shown.label)
    )
    # the mark says it too, for those who do not tell red from green
    first = f"{'✓' if right else '✗'} {said} ({100 * shown.probability:.0f} %)"
    second = f"true: {true}" if right else f"true: {true} ({100 * shown.probability_of_label:.0f} %)"
    for place, line, ink, weight in ((0.10, first, colour, "bold"), (0.235, second, GREY, "normal")):
        axes.text(
            left + 0.5,
            top + 1 + place,
            line,
            fontsize=7,
            color=ink,
            fontweight=weight,
            ha="center",
            va="center",
            parse_math=False,
        )


def _draw_loss(axes: "Axes", curves: dict[str, Curve], scale: float) -> None:
    _plot_noisy(axes, curves.get("train/loss"), scale=scale, colour=GREY, label="train")
    _plot(axes, curves.get("val/loss"), scale=scale, colour=BLUE, label="val", best=min)
    _plot(axes, curves.get("val/loss_ema"), scale=scale, colour=ORANGE, label="val, EMA", best=min)
    axes.set_ylabel("cross-entropy")


def _draw_accuracy(axes: "Axes", curves: dict[str, Curve], scale: float) -> None:
    _plot(axes, curves.get("val/acc1"), scale=scale, colour=BLUE, label="val", best=max, percent=True)
    _plot(axes, curves.get("val/acc1_ema"), scale=scale, colour=ORANGE, label="val, EMA", best=max, percent=True)
    axes.set_ylabel("right, % of images")


def _draw_lr(axes: "Axes", curves: dict[str, Curve], scale: float) -> None:
    curve = curves["train/lr"]
    axes.plot((curve.steps + 1) / scale, curve.values, color=BLUE, linewidth=1.5)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_grad_norm(axes: "Axes", curves: dict[str, Curve], scale: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    curve = curves["train/grad_norm"]
    _plot_noisy(axes, curve, scale=scale, colour=GREY, label="")
    if (curve.values > 0).all():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.5 rather than 5 × 10⁻¹
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("L2 norm before clipping")


_PANELS: tuple[tuple[str, tuple[str, ...], Callable[["Axes", dict[str, Curve], float], None]], ...] = (
    ("Loss", ("train/loss", "val/loss", "val/loss_ema"), _draw_loss),
    ("Top-1 accuracy", ("val/acc1", "val/acc1_ema"), _draw_accuracy),
    ("Learning rate", ("train/lr",), _draw_lr),
    ("Gradient norm", ("train/grad_norm",), _draw_grad_norm),
)


def _plot(
    axes: "Axes",
    curve: Curve | None,
    *,
    scale: float,
    colour: str,
    label: str,
    best: Callable[[Iterable[float]], float],
    percent: bool = False,
) -> None:
    if curve is None:
        return
    values = curve.values * (100 if percent else 1)
    peak = best(values)
    # a few points are shown as points: a line through one validation would be invisible
    marker = "o" if len(values) <= 40 else None
    text = f"{label} (best {peak:.2f}{' %' if percent else ''}, last {values[-1]:.2f}{' %' if percent else ''})"
    axes.plot((curve.steps + 1) / scale, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=text)


def _plot_noisy(axes: "Axes", curve: Curve | None, *, scale: float, colour: str, label: str) -> None:
    if curve is None:
        return
    x = (curve.steps + 1) / scale
    if len(x) < SMOOTH_FROM:
        axes.plot(x, curve.values, color=colour, linewidth=1.3, marker="." if len(x) <= 40 else None, label=label)
        return
    axes.plot(x, curve.values, color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(x, _running_mean(curve.values), color=colour, linewidth=1.6, label=label and f"{label}, running mean")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fiftieth of the points, cut off at both ends."""
    half = max(1, len(values) // 100)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, beyond = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[beyond] - total[first]) / (beyond - first)


def save_picture(figure: "Figure", picture: Path) -> None:
    """Save in one move: who looks at a running job never sees half a picture."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f"{picture.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, picture)

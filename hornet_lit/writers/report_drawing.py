"""The drawing of report.png: confusion matrix, weakest classes, most frequent confusions, accuracy against confidence.

Shape legend: K classes of the network, M of them that occur.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .drawing import BLUE, GREY, save_picture
from .names import short_name
from .outcomes import BINS, ClassRow, Outcomes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = 20  # up to so many classes the matrix has its counts written in
NAMED = 60  # up to so many its rows and columns have names
CELLS = 240  # most cells on a side: smaller ones than a few pixels would not be seen
LISTED = 12  # weakest classes, and most frequent confusions
WIDTH, HEIGHT, DPI = 14.8, 9.7, 120  # inches
SIDE = 8.3  # of the matrix with its names, in inches


def draw_report(
    *,
    picture: Path,
    title: str,
    metrics: Mapping[str, float],
    outcomes: Outcomes,
    count_MM: np.ndarray | None,
    class_names: Sequence[str],
) -> None:
    """Draw what a test found.

    Args:
        picture: the PNG file.
        title: the heading, which should say whose weights these are.
        metrics: what was logged: `test/acc1` and so on, with `_ema` at the end for the averaged weights.
        outcomes: of all images.
        count_MM: the confusion matrix of the classes that occur, by number; None leaves it out.
        class_names: of all K classes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
    figure.text(0.012, 0.968, title, fontsize=14, fontweight="bold", va="center", parse_math=False)
    figure.text(0.012, 0.938, _in_a_line(metrics), fontsize=10, color=GREY, va="center", parse_math=False)
    table = outcomes.table()
    if count_MM is None:
        text = f"{len(table)} classes occur, too many for a matrix"
        figure.text(0.3, 0.5, text, color=GREY, ha="center", fontsize=12)
    else:
        room = 1.2 if len(table) <= NAMED else 0.4  # for names, or numbers
        axes = _panel(figure, left=0.2 + room, top=1.1, width=SIDE - room, height=SIDE - room)
        _draw_matrix(axes, count_MM, labels=[row.label for row in table], class_names=class_names)
    left, width = 10.2, WIDTH - 10.2 - 0.3
    _draw_reliability(_panel(figure, left=left + 0.3, top=1.1, width=width - 0.3, height=2.0), outcomes)
    _draw_weakest(_panel(figure, left=left, top=4.0, width=width, height=2.4), table, class_names)
    _draw_confusions(_panel(figure, left=left, top=6.9, width=width, height=2.4), outcomes, class_names)
    save_picture(figure, picture)


def _panel(figure: "Figure", *, left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place in inches from the top left corner; sizes that the number of classes must not change."""
    return figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))


def _in_a_line(metrics: Mapping[str, float]) -> str:
    kinds = (("acc1", "top-1 {:.2%}"), ("acc5", "top-5 {:.2%}"), ("loss", "loss {:.4f}"), ("ece", "ECE {:.4f}"))
    parts = []
    for suffix, weights in (("", "raw weights"), ("_ema", "EMA weights")):
        found = [text.format(metrics[key]) for name, text in kinds if (key := f"test/{name}{suffix}") in metrics]
        if found:
            parts.append(f"{weights}: {', '.join(found)}")
    return "     ".join(parts).replace("%", " %")


def _draw_matrix(axes: "Axes", count_MM: np.ndarray, *, labels: Sequence[int], class_names: Sequence[str]) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    size = len(labels)
    share_MM = count_MM / np.maximum(count_MM.sum(axis=1, keepdims=True), 1)
    patch = -(-size // CELLS)
    # A power below one: a confusion of a few images in a hundred must be seen beside the diagonal.
    image = axes.imshow(
        _largest_of_patches(share_MM, patch),
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        interpolation="nearest",
        extent=(-0.5, size - 0.5, size - 0.5, -0.5),
    )
    axes.set_title("Images by class (row) and prediction (column)", loc="left", fontsize=11, fontweight="bold")
    axes.tick_params(length=0)
    if size <= NAMED:
        names = [short_name(number=label, class_names=class_names, letters=14) for label in labels]
        fontsize = min(10.0, 360 / size)
        axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=fontsize)
        axes.set_yticks(range(size), names, fontsize=fontsize)
    else:
        places = [int(place) for place in MaxNLocator(10, integer=True).tick_values(0, size - 1) if place < size]
        axes.set_xticks(places, [labels[place] for place in places], fontsize=8)
        axes.set_yticks(places, [labels[place] for place in places], fontsize=8)
        each = f"; each dot is the largest of {patch} × {patch} pairs" if patch > 1 else ""
        axes.set_xlabel(f"class numbers, as in classes.csv{each}", fontsize=9, color=GREY)
    if size <= NUMBERED:
        for row, column in zip(*np.nonzero(count_MM), strict=True):
            colour = "white" if share_MM[row, column] > 0.35 else "black"
            style = {"ha": "center", "va": "center", "color": colour, "fontsize": min(11, 160 / size)}
            axes.text(column, row, str(count_MM[row, column]), **style)
    ticks = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.015, 0, 0.02, 1)), ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.0%}".replace("%", " %") for tick in ticks], fontsize=8)
    bar.outline.set_visible(False)
    bar.set_label("share of the class's images", fontsize=9, color=GREY)


def _largest_of_patches(share_MM: np.ndarray, patch: int) -> np.ndarray:
    missing = -len(share_MM) % patch
    padded = np.pad(share_MM, (0, missing))
    cells = len(padded) // patch
    return padded.reshape(cells, patch, cells, patch).max(axis=(1, 3))


def _draw_reliability(axes: "Axes", outcomes: Outcomes) -> None:
    images, confidence, accuracy = outcomes.reliability()
    seen = images > 0
    share = images / images.sum()
    axes.bar((np.arange(BINS) + 0.5) / BINS, share, width=0.9 / BINS, color="#d1d5db")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    axes.plot(confidence[seen], accuracy[seen], color=BLUE, marker="o", markersize=4, linewidth=1.4)
    axes.set_title("Accuracy against confidence", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("probability of the prediction; grey: share of the images", fontsize=9, color=GREY)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_weakest(axes: "Axes", table: Sequence[ClassRow], class_names: Sequence[str]) -> None:
    # Of equally weak ones the class with the most images first: there it is the least by chance.
    rows = sorted((row for row in table if row.images), key=lambda row: (row.correct / row.images, -row.images))
    lines = [
        (
            row.correct / row.images,
            short_name(number=row.label, class_names=class_names, letters=34),
            f"{100 * row.correct / row.images:.1f} % of {row.images}",
        )
        for row in rows[:LISTED]
    ]
    _draw_bars(axes, "Classes by accuracy, the lowest first", lines, longest=1.0, colour="#bfd3ea")


def _draw_confusions(axes: "Axes", outcomes: Outcomes, class_names: Sequence[str]) -> None:
    found = outcomes.confusions()[:LISTED]
    lines = [
        (
            one.images,
            " → ".join(short_name(number=n, class_names=class_names, letters=20) for n in (one.label, one.predicted)),
            f"{one.images} of {one.of}",
        )
        for one in found
    ]
    longest = max((one.images for one in found), default=1)
    _draw_bars(axes, "Most frequent confusions", lines, longest=longest, colour="#f6d3b3")


def _draw_bars(
    axes: "Axes", title: str, lines: Sequence[tuple[float, str, str]], *, longest: float, colour: str
) -> None:
    """Of each line a bar as long as its number, with a text on it and another at the right end."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_axis_off()
    right = 1.33 * longest  # room for the numbers
    axes.set_xlim(0, right)
    axes.set_ylim(LISTED - 0.5, -0.5)
    axes.barh(range(len(lines)), [length for length, _, _ in lines], height=0.86, color=colour)
    for place, (_, text, number) in enumerate(lines):
        axes.text(0.01 * longest, place, text, fontsize=8.5, va="center", parse_math=False)
        axes.text(right, place, number, fontsize=8.5, va="center", ha="right", color=GREY, parse_math=False)
    if not lines:
        axes.text(0, 0, "none", fontsize=8.5, va="center", color=GREY)

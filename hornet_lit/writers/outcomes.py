"""What a test found, image by image, and what follows from it by counting.

Shape legend: N images, M classes of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15  # of confidence, as in the logged calibration error


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A class: its images, how many were recognised, and the class that most others were taken for (None: none)."""

    label: int
    images: int
    correct: int
    confused: int | None
    confused_images: int


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """`images` images of the class `label`, which has `of` in all, were taken for the class `predicted`."""

    label: int
    predicted: int
    images: int
    of: int


class Outcomes:
    """Labels, predictions and confidences (probabilities of the predictions) of N images; label -1 is left out."""

    def __init__(self, *, label_N: np.ndarray, predicted_N: np.ndarray, confidence_N: np.ndarray) -> None:
        counted_N = label_N >= 0
        self.label_N = label_N[counted_N].astype(np.int64)
        self.predicted_N = predicted_N[counted_N].astype(np.int64)
        self.confidence_N = confidence_N[counted_N].astype(np.float64)
        self.correct = int((self.label_N == self.predicted_N).sum())

    def confusions(self) -> list[Confusion]:
        """Every pair of different classes that occurs, the most frequent first, then by share of the class, then by
        number."""
        wrong_N = self.label_N != self.predicted_N
        pair_P2, images_P = np.unique(
            np.stack([self.label_N[wrong_N], self.predicted_N[wrong_N]], axis=1), axis=0, return_counts=True
        )
        of = np.bincount(self.label_N)
        found = [
            Confusion(label=int(label), predicted=int(predicted), images=int(images), of=int(of[label]))
            for (label, predicted), images in zip(pair_P2, images_P, strict=True)
        ]
        return sorted(found, key=lambda c: (-c.images, c.of, c.label, c.predicted))

    def table(self) -> list[ClassRow]:
        """The classes that occur, as label or as prediction, by number."""
        size = int(max(self.label_N.max(initial=-1), self.predicted_N.max(initial=-1))) + 1
        images = np.bincount(self.label_N, minlength=size)
        predicted = np.bincount(self.predicted_N, minlength=size)
        correct = np.bincount(self.label_N[self.label_N == self.predicted_N], minlength=size)
        first: dict[int, Confusion] = {}
        for confusion in self.confusions():
            first.setdefault(confusion.label, confusion)
        return [
            ClassRow(
                label=label,
                images=int(images[label]),
                correct=int(correct[label]),
                confused=first[label].predicted if label in first else None,
                confused_images=first[label].images if label in first else 0,
            )
            for label in np.flatnonzero(images + predicted).tolist()
        ]

    def matrix(self, labels: Sequence[int]) -> np.ndarray:
        """Images by label (row) and prediction (column) among `labels`, in their order: int64 count_MM."""
        place = {label: i for i, label in enumerate(labels)}
        count_MM = np.zeros((len(labels), len(labels)), dtype=np.int64)
        rows = [place[label] for label in self.label_N.tolist()]
        columns = [place[label] for label in self.predicted_N.tolist()]
        np.add.at(count_MM, (rows, columns), 1)
        return count_MM

    def reliability(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of BINS equal ranges of confidence: images, mean confidence and accuracy (nan where there are no images)."""
        bin_N = np.minimum((self.confidence_N * BINS).astype(np.int64), BINS - 1)
        images = np.bincount(bin_N, minlength=BINS)
        with np.errstate(invalid="ignore"):
            confidence = np.bincount(bin_N, weights=self.confidence_N, minlength=BINS) / images
            accuracy = np.bincount(bin_N, weights=self.label_N == self.predicted_N, minlength=BINS) / images
        return images, confidence, accuracy

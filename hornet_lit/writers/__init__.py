"""Callbacks that write what a run leaves behind for people: tables of predictions and of a test, learning curves,
a sheet of images.

Nothing here imports another room of the package: the callbacks ask the trainer's datamodule and module for what they
need by attribute (`predict_files`, `class_names`, `denormalise`), so they serve any LightningModule that keeps to the
same few names.
"""

from .evaluation import EvaluationReport
from .pictures import LearningCurves, PredictionSheet
from .predictions import PredictionWriter

__all__ = ["EvaluationReport", "LearningCurves", "PredictionSheet", "PredictionWriter"]

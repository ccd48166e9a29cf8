"""Data: what the network sees, in which order, and whether a resumed run sees the same.

Every data module takes the GLOBAL batch size, sends uint8 to the device and normalises there, and draws order and
augmentation from (seed, epoch, index) alone.
"""

from .base import ImageDataModule
from .cifar import CIFARDataModule
from .digits import DigitsDataModule
from .imagenet import ImageNetDataModule

__all__ = ["CIFARDataModule", "DigitsDataModule", "ImageDataModule", "ImageNetDataModule"]

"""Which image comes when, and with which random numbers: functions of (seed, epoch, index) and of nothing else.

Workers, ranks and interruptions do not enter, so a resumed run sees the same images in the same order with the same
augmentation. Samplers yield keys (epoch, index), because a worker process cannot be told the epoch in any other way.

Shape letters: B batch, C channels, H height, W width, N images in the set, V views of an image, L labels of an image.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from .images import UnreadableImageError
from .skipping import SkipList
from .workers import sigterm_blocked

Key = tuple[int, int]  # (epoch, index)
_MOST_DRAWS = 100  # of an image in the place of an unreadable one, before most of the set must be unreadable
PADDING = -1  # label, or index for predict, of a sample that only fills up the last batches of a rank


class _KeySampler(SequentialSampler):
    """Called sequential because Lightning's overfit_batches would put its own, without keys, in any other's place."""

    def __init__(self) -> None:
        pass  # there is no data source


class TrainSampler(_KeySampler):
    """Shuffled keys for one rank: every `batch_size / world` of them belong to one optimizer step.

    The order of the whole set is a permutation drawn from (seed, epoch). Rank r takes places r, r + world, …, so the
    images of an optimizer step are the same for any number of ranks. The last, partial global batch is left out.

    Args:
        size: images in the set.
        batch_size: global batch; `size` must hold at least one.
        world, rank: number of ranks that read different images, and this one.
        seed: of the permutation.
        epoch: epoch to begin with (Lightning makes the first iterator before it calls `set_epoch`).
        skip: keys of `epoch` that this rank has consumed already, in the run that is being resumed.
        fixed_order: use the order of epoch 0 always (Lightning's overfit_batches means the same batches each epoch).
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
        epoch: int = 0,
        skip: int = 0,
        fixed_order: bool = False,
    ) -> None:
        assert batch_size % world == 0 and size >= batch_size and 0 <= rank < world
        self.size = size
        self.used = size // batch_size * batch_size
        self.world = world
        self.rank = rank
        self.seed = seed
        self.epoch = epoch
        self.fixed_order = fixed_order
        self._resumed = (epoch, skip)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        # The full epoch even when resumed in the middle: Lightning counts the consumed batches itself.
        return self.used // self.world

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]
        epoch = self.epoch
        order_N = epoch_order(self.size, seed=self.seed, epoch=0 if self.fixed_order else epoch)[: self.used]
        mine = order_N[self.rank :: self.world]
        resumed_epoch, skip = self._resumed
        # The loader may be iterated more than once, so the offset belongs to an epoch, not to the first iterator.
        for index in mine[skip if epoch == resumed_epoch else 0 :].numpy():
            yield epoch, int(index)


def epoch_order(size: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch goes through the images (size,)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_from(seed, epoch)))


class EvalSampler(_KeySampler):
    """Keys 0, 1, 2, … in batches, every `world`-th of which is this rank's: the batches of a single process, dealt out.

    Whole batches and not images, because the last bits of an image's logits may depend on the batch it stands in (a
    matrix product with one row takes another kernel): dealt so, they do not depend on the number of ranks. All ranks
    get equally many batches, so that no collective call hangs; those that lack a last one get as much padding as it
    holds. Padding has the index `size`: datasets answer it with their first image and the label -1.
    """

    def __init__(self, *, size: int, batch_size: int, world: int = 1, rank: int = 0) -> None:
        assert size > 0 and batch_size > 0 and 0 <= rank < world
        self.size = size
        self.batch_size = batch_size
        self.world = world
        self.rank = rank
        self.batches = -(-size // batch_size)

    def __len__(self) -> int:
        return sum(map(len, self._dealt()))

    def __iter__(self) -> Iterator[Key]:  # type: ignore[override]
        for indices in self._dealt():
            for index in indices:
                yield 0, min(index, self.size)

    def _dealt(self) -> Iterator[range]:
        last = self.size - (self.batches - 1) * self.batch_size  # images in the last batch
        for number in range(self.rank, -(-self.batches // self.world) * self.world, self.world):
            length = self.batch_size if number < self.batches - 1 else last
            yield range(number * self.batch_size, number * self.batch_size + length)


class ImageSource(Protocol):
    """Where images come from: a folder, tar files, a Hugging Face data set."""

    label_N: np.ndarray  # or label_NL
    in_chans: int

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The decoded image and its int64 label, or labels (L,); UnreadableImageError when it cannot be read."""


class KeyedImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of transformed images from an ImageSource, made from a list of keys.

    Args:
        source: decoded images and labels.
        transform: PIL image → uint8 CHW, or VCHW; may draw from python's, numpy's and torch's global generators.
        seed: None in evaluation, whose transform is deterministic; else those generators are seeded from (seed, epoch,
            index).
        skipped: goes on without unreadable images, which it lists. In training another image takes the place, drawn
            from (seed, epoch, index); in evaluation the place becomes padding, which counts in no metric. None: an
            unreadable image is an error.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int | None = None,
        skipped: SkipList | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, np.ndarray]:
        with generators_kept():
            return self._sample(key)

    def _sample(self, key: Key) -> tuple[Tensor, np.ndarray]:
        epoch, index = key
        is_padding = index >= len(self.source)
        image, label = self._read(epoch, 0 if is_padding else index)
        if self.seed is not None:
            draw_from(self.seed, epoch, index)
        return self.transform(image), np.full_like(label, PADDING) if is_padding else label

    def warn_of_skipped(self) -> None:
        """Say how many images were unreadable, and what came of them."""
        outcome = "and count in no result" if self.seed is None else "and others were trained on instead"
        if self.skipped is not None and (said := self.skipped.report(size=len(self), outcome=outcome)):
            warnings.warn(said, stacklevel=2)

    def _read(self, epoch: int, index: int) -> tuple[Image.Image, np.ndarray]:
        place, draws = index, 0
        while True:
            try:
                return self.source.read(place)
            except UnreadableImageError as error:
                if self.skipped is None or draws == _MOST_DRAWS:
                    raise
                self.skipped.add(error)
            if self.seed is None:
                blank = Image.new("RGB" if self.source.in_chans == 3 else "L", (1, 1))
                return blank, np.full_like(self.source.label_N[index], PADDING)
            draws += 1
            place = seed_from(self.seed, epoch, index, draws) % len(self.source)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        with generators_kept():
            samples = [self._sample(key) for key in keys]
        x_BCHW = torch.stack([x for x, _ in samples])
        return x_BCHW, torch.from_numpy(np.array([y for _, y in samples], dtype=np.int64))


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """Tells Lightning, which would warn otherwise, that resuming within an epoch is seen to: by the data module.

    And forks its workers so that they outlive signals, see `workers`.
    """

    def __iter__(self) -> Any:
        with sigterm_blocked():
            return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def pass_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """collate_fn for data sets whose `__getitems__` makes whole batches."""
    return batch


def seed_from(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_from(*numbers: int) -> None:
    """Seed python, numpy and torch (CPU) from `numbers`."""
    seed = seed_from(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed: that would seed the GPU's generators as well, which `generators_kept` does not restore.
    torch.random.default_generator.manual_seed(seed)


@contextmanager
def random_from(*numbers: int) -> Iterator[None]:
    """Seed python, numpy and torch (CPU) from `numbers` within the block, and leave all three as they were after it."""
    with generators_kept():
        draw_from(*numbers)
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the generators of python, numpy and torch (CPU) as they were before the block.

    That matters with num_workers=0, where the block runs in the process that also draws drop path and mixup. It takes
    five times as long as `draw_from`, so it is done once a batch.
    """
    state_python, state_numpy, state_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state_python)
        np.random.set_state(state_numpy)
        torch.set_rng_state(state_torch)

"""How one global training batch is split over devices and micro-batches, and how many make an epoch: no tensors.

A recipe states the global batch once; micro-batch and accumulation follow from the number of devices, so that
`world * micro * accumulation == batch_size` always holds or the user is told what to change.
"""

from __future__ import annotations

import math
import os

import lightning.pytorch as pl


def split_batch(*, batch_size: int, world: int, batch_size_per_device: int | None = None) -> tuple[int, int]:
    """Split a global batch into (images per device and step of the loop, accumulated steps).

    Args:
        batch_size: images per optimizer step, over all devices.
        world: number of devices that read different images.
        batch_size_per_device: the most images that one device takes at once; None for no limit.

    Returns:
        (micro, accumulation) with world * micro * accumulation == batch_size.

    Raises:
        ValueError: the batch does not divide; the message names numbers that do.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give a positive number of images per optimizer step")
    if batch_size_per_device is not None and batch_size_per_device < 1:
        raise ValueError(
            f"batch_size_per_device is {batch_size_per_device}: give a positive number, or null for no limit"
        )
    share, rest = divmod(batch_size, world)
    if rest:
        near = _nearest_multiple(batch_size, world)
        raise ValueError(
            f"batch_size {batch_size} (the global batch) does not divide over {world} devices: "
            f"set data.batch_size to {near}, or use a number of devices that divides {batch_size}"
        )
    if batch_size_per_device is None or share <= batch_size_per_device:
        return share, 1
    if share % batch_size_per_device:
        fits = max(d for d in range(1, batch_size_per_device + 1) if share % d == 0)
        near = world * _nearest_multiple(share, batch_size_per_device)
        raise ValueError(
            f"batch_size {batch_size} on {world} device(s) is {share} images each, which is no multiple of "
            f"batch_size_per_device {batch_size_per_device}: set data.batch_size_per_device to {fits}, "
            f"or data.batch_size to {near}"
        )
    return batch_size_per_device, share // batch_size_per_device


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of


def limited(length: int, limit: int | float | None) -> int:
    """Loop steps left of `length` under Lightning's `limit_train_batches` (an int counts, a float is a share)."""
    if limit is None:
        return length
    return min(length, limit) if isinstance(limit, int) else int(length * limit)


def optimizer_steps(loop_steps: int, accumulation: int) -> int:
    """Optimizer steps in an epoch of `loop_steps`; Lightning also steps on the last batch, whatever it accumulated."""
    return math.ceil(loop_steps / accumulation)


def useful_workers(asked: int, *, batches: int) -> int:
    """Loader processes to start: no more than this process may use cores, or than there are batches to make.

    The published recipes ask for 10, which on two cores only wait for each other. Batches do not depend on it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked, max(cores, 1), max(batches, 1))


def resume_at_epoch_end(trainer: pl.Trainer) -> None:
    """Let a run with max_steps go on with the next epoch when its checkpoint was saved after the end of one.

    With max_steps Lightning 2.6.6 takes every resumed run to be within an epoch, keeps the finished epoch's batch
    counters and so skips the next one. With max_epochs alone it takes the branch that this chooses.
    """
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current
    if loop.restarting and trainer.max_steps != -1 and 0 < epochs.started == epochs.processed:
        loop._restarting = False  # its setter would put it back to True
        loop.epoch_loop.restarting = False

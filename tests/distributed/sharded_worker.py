"""Trainings for test_sharded: as a process of two under FSDP2 and ddp (``main``), or alone (``train``).

Digits, global-local filters resized from a file of another image size, layer decay, averages that begin within the
first epoch; what differs between two runs is named in the call.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from hornet_lit.data import DigitsDataModule
from hornet_lit.module import ImageClassifier
from hornet_lit.network.build import build_network
from hornet_lit.strategy import FullyShardedStrategy
from tests.conftest import filled_by_rule

EPOCHS, STEPS, BATCH = 2, 6, 32
NETWORK = {"depths": [1, 1, 2, 1], "base_dim": 16, "ls_init_value": 0.1}


def write_start(folder: Path) -> None:
    """The weights that every run starts from: their spectra are those of 32×32 images, the runs' of 16×16."""
    network = build_network("hornet_nano_gf_32", num_classes=10, in_chans=1, img_size=32, options=NETWORK)
    torch.save({"model": filled_by_rule(network)}, folder / "start.pth")


def module(folder: Path, **changes: Any) -> ImageClassifier:
    pl.seed_everything(0, verbose=False)
    settings: dict[str, Any] = {
        "network": "hornet_nano_gf_32",
        "in_chans": 1,
        "img_size": 16,
        "network_options": NETWORK,
        "weights": str(folder / "start.pth"),
        "lr": 1e-3,
        "layer_decay": 0.8,
        "warmup_epochs": 0.5,
        "ema_decay": 0.9,
        "ema_start_epoch": 0.5,
    }
    return ImageClassifier(**(settings | changes))


def train(
    folder: Path,
    name: str,
    *,
    strategy: str = "auto",
    world: int = 1,
    resume: Path | None = None,
    sharded: bool = True,
    precision: str = "32-true",
    epochs: int = EPOCHS,
    model: ImageClassifier | None = None,
    **changes: Any,
) -> pl.Trainer:
    """One run; its checkpoints are folder/name/epoch=N.ckpt. ``strategy``: auto, ddp or fsdp."""
    out = folder / name
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy(save_distributed_checkpoint=sharded) if strategy == "fsdp" else strategy,
        precision=precision,
        max_epochs=epochs,
        limit_train_batches=STEPS * (2 // world),
        limit_val_batches=1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            ModelCheckpoint(out, filename="{epoch}", save_top_k=-1, every_n_epochs=1),
            *([OnExceptionCheckpoint(out)] if model is not None else []),
        ],
    )
    data = DigitsDataModule(batch_size=BATCH, batch_size_per_device=BATCH // 2, eval_batch_size=50, img_size=16)
    trainer.fit(model or module(folder, **changes), datamodule=data, ckpt_path=resume)
    return trainer


def break_validation(model: ImageClassifier) -> None:
    """The first validation ends with an error in the middle of the network, while it computes with the averages."""
    model.configure_model_ = model.configure_model

    def configure_model() -> None:
        model.configure_model_()
        passes = iter((False, True))

        def fail(*_: Any) -> None:
            if not model.network.training and next(passes):
                raise ArithmeticError("broken on purpose")

        model.network.stages[2][1].register_forward_hook(
            fail
        )  # of a layer within, it would keep the fused kernels away

    model.configure_model = configure_model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    two = {"strategy": "fsdp", "world": 2}
    train(folder, "two", **two)
    train(folder, "two resumed", resume=folder / "two" / "epoch=0.ckpt", **two)
    train(folder, "one to two", resume=folder / "one" / "epoch=0.ckpt", **two)
    broken = module(folder)
    break_validation(broken)
    with suppress(ArithmeticError):
        train(folder, "broken", model=broken, **two)
    drop = {"epochs": 1, "sharded": False, "drop_path_rate": 0.3}
    train(folder, "dropped", **two, **drop)
    train(folder, "recomputed", **two, **drop, grad_checkpointing=True)
    losses = {}
    for precision in ("bf16-mixed", "bf16-true"):
        for strategy in ("ddp", "fsdp"):
            name = f"{strategy} {precision}"
            trainer = train(folder, name, strategy=strategy, world=2, sharded=False, precision=precision, lr=4e-3)
            losses[name] = float(trainer.callback_metrics["val/loss"])
    if trainer.global_rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

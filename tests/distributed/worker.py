"""One process of a training on digits: fit two epochs, resume from the first, validate, predict. Run by test_processes.

Everything goes through the Trainer, strategies and datamodule that the recipes use.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hornet_lit.data import DigitsDataModule
from hornet_lit.data.digits import save_images
from hornet_lit.module import ImageClassifier
from hornet_lit.strategy import FullyShardedStrategy
from hornet_lit.writers import PredictionWriter

EPOCHS, STEPS, BATCH, IMAGES = 2, 10, 32, 37


def module() -> ImageClassifier:
    pl.seed_everything(0, verbose=False)
    return ImageClassifier(
        network="hornet_nano_gf_32",
        in_chans=1,
        img_size=16,
        network_options={"depths": [1, 1, 2, 1], "base_dim": 16, "ls_init_value": 0.1},
        lr=1e-3,
        warmup_epochs=1,
        ema_decay=0.9,
    )


def data(folder: Path, per_device: int | None) -> DigitsDataModule:
    return DigitsDataModule(
        batch_size=BATCH, batch_size_per_device=per_device, eval_batch_size=50, img_size=16, predict_path=str(folder)
    )


def trainer(out: Path, strategy: str, world: int, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy() if strategy == "fsdp" else strategy,
        max_epochs=EPOCHS,
        limit_train_batches=kwargs.pop("micro_batches", STEPS),
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **kwargs,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    averages = {f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}
    return checkpoint["state_dict"] | averages


def main(out: Path, strategy: str, world: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    pictures = out.parent / "pictures"
    if not pictures.exists():
        save_images(pictures, IMAGES)
    per_device = BATCH // world // accumulation if accumulation > 1 else None
    micro = STEPS * accumulation
    saver = ModelCheckpoint(out / "whole", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    first = trainer(out, strategy, world, callbacks=[saver], micro_batches=micro)
    first.fit(module(), datamodule=data(pictures, per_device))
    saver = ModelCheckpoint(out / "resumed", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    second = trainer(out, strategy, world, callbacks=[saver], micro_batches=micro)
    second.fit(module(), datamodule=data(pictures, per_device), ckpt_path=out / "whole" / "epoch=0.ckpt")
    last = out / "whole" / "epoch=1.ckpt"
    third = trainer(out, strategy, world, callbacks=[PredictionWriter(output=str(out / "predictions.csv"))])
    scores = third.validate(module(), datamodule=data(pictures, None), ckpt_path=last, verbose=False)[0]
    third.predict(module(), datamodule=data(pictures, None), ckpt_path=last, return_predictions=False)
    if third.global_rank == 0:
        whole, resumed = weights(last), weights(out / "resumed" / "epoch=1.ckpt")
        assert whole.keys() == resumed.keys()
        scores["resume_difference"] = max((whole[k] - resumed[k]).abs().max().item() for k in whole)
        scores["steps"] = first.global_step
        scores["accumulation"] = first.accumulate_grad_batches
        (out / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""One process of a training on digits: two epochs, a checkpoint after each. Run by test_processes.

Everything goes through the Trainer, strategies and datamodule that the recipes use.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hornet_lit.data import DigitsDataModule
from hornet_lit.module import ImageClassifier
from hornet_lit.strategy import FullyShardedStrategy

EPOCHS, STEPS, BATCH = 2, 10, 32


def module() -> ImageClassifier:
    pl.seed_everything(0, verbose=False)
    return ImageClassifier(
        network="hornet_nano_gf_32",
        num_classes=10,
        in_chans=1,
        img_size=16,
        network_options={"depths": [1, 1, 2, 1], "base_dim": 16, "ls_init_value": 0.1},
        lr=1e-3,
        warmup_epochs=1,
        ema_decay=0.9,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    averages = {f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}
    return checkpoint["state_dict"] | averages


def main(out: Path, strategy: str, world: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    per_device = BATCH // world // accumulation
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy() if strategy == "fsdp" else strategy,
        max_epochs=EPOCHS,
        limit_train_batches=STEPS * accumulation,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(out, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = DigitsDataModule(batch_size=BATCH, batch_size_per_device=per_device, eval_batch_size=50, img_size=16)
    trainer.fit(module(), datamodule=data)
    if trainer.is_global_zero:
        found = {"steps": trainer.global_step, "accumulation": trainer.accumulate_grad_batches}
        (out / "outcome.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

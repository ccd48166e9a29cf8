"""`test` on ReaL's label sets with mirrored views: as one process, or as one of several under ddp and FSDP2.

python -m tests.distributed.evaluation FOLDER WORLD
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image

from hornet_lit.data import ImageNetDataModule
from hornet_lit.module import ImageClassifier
from hornet_lit.network.build import build_network
from hornet_lit.strategy import FullyShardedStrategy
from hornet_lit.writers import EvaluationReport
from tests.conftest import filled_by_rule, images

STRATEGIES = {1: ("auto",), 2: ("ddp", "fsdp")}
COUNTS = {2: 1, 10: 9}  # images of ImageNet's val, from the first, and how many of these have a ReaL label
NETWORK = "hornet_pico_32"
SIZES = {"num_classes": 1000, "img_size": 32}
OPTIONS = {"base_dim": 16, "depths": [1, 1, 1, 1]}


def prepare(folder: Path) -> None:
    network = build_network(NETWORK, **SIZES, options=OPTIONS)
    torch.save({"model": filled_by_rule(network)}, folder / "weights.pth")
    for count in COUNTS:
        (folder / str(count)).mkdir()
        for n in range(1, count + 1):
            pixels_HWC = (images(n, 32, 32, 3) * 64 + 128).clamp(0, 255).byte().numpy()
            Image.fromarray(pixels_HWC).save(folder / str(count) / f"ILSVRC2012_val_{n:08d}.JPEG", "PNG")


def evaluate(folder: Path, count: int, strategy: str, world: int) -> None:
    """Raw weights by the golden rule, averaged ones with another head."""
    module = ImageClassifier(network=NETWORK, network_options=OPTIONS, weights=str(folder / "weights.pth"), **SIZES)
    averages = torch.load(folder / "weights.pth", weights_only=True)["model"]
    averages["head.weight"] = -averages["head.weight"]
    module.on_load_checkpoint({"ema": {"decay": 0.9, "state_dict": averages}})
    data = ImageNetDataModule(
        root=str(folder / str(count)),
        evaluation_set="imagenet_real",
        views="flip",
        img_size=32,
        eval_batch_size=2,
        num_workers=0,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy() if strategy == "fsdp" else strategy,
        callbacks=[EvaluationReport(output=str(folder / f"{strategy}-{count}"))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        (folder / f"{strategy}-{count}" / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in STRATEGIES[int(sys.argv[2])]:
        for number in COUNTS:
            evaluate(Path(sys.argv[1]), number, name, int(sys.argv[2]))

"""The LightningModule: classification with any timm-registered network, trained as HorNet was published.

Shapes: B batch, C channels, H height, W width, K classes. A label of -1 marks padding: it counts in no metric or loss.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from timm.data import ImageNetInfo, Mixup
from torch import nn
from torch.distributed.tensor import DTensor

from hornet_lit.averaging import AveragedModule
from hornet_lit.evaluation import Batch, EvaluatedModule, new_metrics
from hornet_lit.guard import GuardedModule
from hornet_lit.last import LastCheckpoint
from hornet_lit.network import load_weights
from hornet_lit.network.build import build_network
from hornet_lit.network.sharding import shard
from hornet_lit.optim import OptimizerName, WarmupCosine, build_optimizer, check_ranges


class ImageClassifier(AveragedModule, GuardedModule, EvaluatedModule):
    """Image classification as published for HorNet: AdamW, per-step warm-up and cosine, mixup/CutMix, EMA.

    Args:
        network: name registered with timm (`hornet-lit` registers HorNet's).
        num_classes: K; None takes it from the datamodule's classes.
        in_chans: channels of the images.
        img_size: side of the images, handed to networks that ask for one; None leaves the network's default.
        drop_path_rate: stochastic depth.
        network_options: further keyword arguments of the network.
        weights: file to start from, see `hornet_lit.load_weights`.
        freeze_backbone: train the classifier alone (linear probe).
        optimizer: "adamw" as published, or "muon", see `build_optimizer`.
        lr: peak learning rate at the recipe's global batch size.
        min_lr: where the cosine ends.
        weight_decay: of parameters with more than one dimension.
        layer_decay: factor on the learning rate per layer below the head (fine-tuning).
        warmup_epochs: linear warm-up; fractions allowed.
        label_smoothing: of the targets, mixed or not.
        mixup, cutmix: α of each; 0 switches it off.
        mix_prob: share of batches mixed. mix_switch_prob: of these, the share of CutMix.
        ema_decay: of the averaged weights, validated beside the raw ones; None keeps no average.
        ema_start_epoch: when the average begins, as a copy of the weights; fractions allowed. Before, there is none.
        skip_nonfinite: steps of the whole training that may be skipped because their loss or gradients are not
            finite; the next such step stops it.
        predict_weights: which weights `predict` uses; "auto" is EMA where there is one.
        compile: compile the network in place (state-dict names stay clean).
        channels_last: lay convolution weights and inputs out channels-last.
        grad_checkpointing: recompute blocks in the backward pass to save memory; or the stages (0 to 3) to do so in.
    """

    def __init__(
        self,
        *,
        network: str = "hornet_tiny_7x7",
        num_classes: int | None = None,
        in_chans: int = 3,
        img_size: int | None = None,
        drop_path_rate: float = 0.0,
        network_options: dict[str, Any] | None = None,
        weights: str | None = None,
        freeze_backbone: bool = False,
        optimizer: OptimizerName = "adamw",
        lr: float = 4e-3,
        min_lr: float = 1e-6,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        ema_decay: float | None = None,
        ema_start_epoch: float = 0.0,
        skip_nonfinite: int = 0,
        predict_weights: Literal["auto", "ema", "raw"] = "auto",
        compile: bool = False,
        channels_last: bool = True,
        grad_checkpointing: bool | list[int] = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_ranges(self.hparams)
        self.network: nn.Module | None = None
        self.class_names: list[str] | None = None
        self._mixup: Mixup | None = None
        self._loss = self._grad_norm = torch.tensor(0.0)
        self._batch_idx = 0

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        # Outside fit a checkpoint decides the classes: an evaluation set alone may lack some of them, and the
        # datamodule relabels it when it meets the checkpoint's list. Whether there is one shows only after its loading.
        names = self._data_classes()
        if stage == "fit":
            self._take_classes(names)
        elif self.hparams["num_classes"] is None and names is not None:
            self.hparams["num_classes"] = len(names)

    def _data_classes(self) -> list[str] | None:
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        return None if names is None else list(names)

    def _take_classes(self, names: list[str] | None) -> None:
        classes = self.hparams["num_classes"]
        if names is None:
            if classes is None:
                raise ValueError("the number of classes is unknown: give --model.num_classes")
            return
        if classes not in (None, len(names)):
            # Weights that are only evaluated keep their number of classes: there the data has to give way.
            mend = f"set --model.num_classes {len(names)}"
            if not self.trainer.training:
                mend = "evaluate on data with the classes of the weights; --data.class_map FILE lists all, one a line"
            raise ValueError(f"the data has {len(names)} classes but model.num_classes is {classes}: {mend}")
        self.hparams["num_classes"] = len(names)
        self._check_classes(names, self.class_names)
        self.class_names = names

    def configure_model(self) -> None:
        if self.network is not None:
            return
        hparams = self.hparams
        if hparams["num_classes"] is None:
            raise ValueError("the number of classes is unknown: give num_classes")
        self.network = build_network(
            hparams["network"],
            num_classes=hparams["num_classes"],
            in_chans=hparams["in_chans"],
            img_size=hparams["img_size"],
            drop_path_rate=hparams["drop_path_rate"],
            options=hparams["network_options"],
        )
        self._load_initial_weights()
        if hparams["freeze_backbone"]:
            self.network.requires_grad_(False)
            self.network.get_classifier().requires_grad_(True)
        if hparams["grad_checkpointing"]:
            self.network.set_grad_checkpointing(hparams["grad_checkpointing"])
        if self._device_mesh is not None:
            mixed = self._trainer is not None and self.trainer.precision == "bf16-mixed"
            shard(self.network, self._device_mesh["data_parallel"], dtype=torch.bfloat16 if mixed else None)
        elif hparams["channels_last"]:
            # FSDP2 refuses parameters that are not contiguous. Depth-wise weights lie the same way in both layouts, and
            # so do those of a single channel, whose strides would only pick another kernel than under FSDP2.
            for module in self.network.modules():
                if isinstance(module, nn.Conv2d) and module.groups == 1 < module.in_channels:
                    module.to(memory_format=torch.channels_last)
        if hparams["compile"]:
            self.network.compile()
        self.metrics = new_metrics(hparams["num_classes"])

    def _load_initial_weights(self) -> None:
        path = self.hparams["weights"]
        if not path or (self._trainer is not None and self.trainer.ckpt_path):
            return
        report = load_weights(self.network, path, class_names=self.class_names, verbose=False)
        rank_zero_info(str(report))
        if report.initialised:
            # Drawn with the source's seed, a new head starts as the source's once did, and ties its old classes to the
            # new ones: a linear probe began at 6 % of 5 classes. From zero every class begins alike.
            for p in self.network.get_classifier().parameters():
                nn.init.zeros_(p)
        if report.initialised and self._trainer is not None and not self.trainer.training:
            raise ValueError(
                f"{path} has no classifier for these {self.hparams['num_classes']} classes: "
                f"set --model.num_classes to its own number, or fine-tune it first"
            )
        if self.class_names is None:
            self.class_names = report.class_names

    @staticmethod
    def _check_classes(data: list[str] | None, trained: list[str] | None) -> None:
        if None not in (data, trained) and data != trained:
            differing = sorted(set(data) ^ set(trained))
            detail = f"not in both: {', '.join(differing[:5])}" if differing else "their order differs"
            raise ValueError(
                f"the data's {len(data)} classes are not the {len(trained)} that the checkpoint was trained on "
                f"({detail}): point --data at the same class list"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        hparams = self.hparams
        optimizer = build_optimizer(
            self.network,
            optimizer=hparams["optimizer"],
            lr=hparams["lr"],
            weight_decay=hparams["weight_decay"],
            layer_decay=hparams["layer_decay"],
            fused=self.trainer.precision != "16-mixed",
        )
        total, per_epoch = self._steps()
        scheduler = WarmupCosine(
            optimizer,
            total_steps=total,
            warmup_steps=round(hparams["warmup_epochs"] * per_epoch),
            min_lr=hparams["min_lr"],
        )
        self.plan_ema(steps_per_epoch=per_epoch, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _steps(self) -> tuple[int, float]:
        """(optimizer steps of the whole training, of one epoch).

        Not `estimated_stepping_batches` where it can be helped: it builds the loaders anew, which loses the position
        that a resumed loader starts from.
        """
        trainer = self.trainer
        per_epoch = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
        if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise ValueError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        if per_epoch is None:
            total = int(trainer.estimated_stepping_batches)
            return total, total / max(trainer.max_epochs or 1, 1)
        by_epochs = None if trainer.max_epochs in (None, -1) else per_epoch * trainer.max_epochs
        by_steps = None if trainer.max_steps == -1 else trainer.max_steps
        total = min(n for n in (by_epochs, by_steps) if n is not None)
        if total < 1:
            raise ValueError("nothing to train: set --trainer.max_epochs or --trainer.max_steps above 0")
        return total, per_epoch

    def lr_scheduler_step(self, scheduler: WarmupCosine, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    # ---------------------------------------------------------------- training

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to logits (B, K)."""
        if self.hparams["channels_last"]:
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        return self.network(x_BCHW)

    def configure_callbacks(self) -> list[Callback]:
        return [LastCheckpoint()]

    def on_fit_start(self) -> None:
        hparams = self.hparams
        if hparams["mixup"] or hparams["cutmix"]:
            self._mixup = Mixup(
                mixup_alpha=hparams["mixup"],
                cutmix_alpha=hparams["cutmix"],
                prob=hparams["mix_prob"],
                switch_prob=hparams["mix_switch_prob"],
                mode="batch",
                label_smoothing=hparams["label_smoothing"],
                num_classes=hparams["num_classes"],
            )

    def on_train_epoch_start(self) -> None:
        if self.hparams["freeze_backbone"]:
            self.network.eval()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Mixup and stochastic depth draw from the global generators. Seeding them from the position in the training
        # lets a resumed run draw what the uninterrupted one drew, with no generator state in the checkpoint.
        run_seed = os.environ.get("PL_GLOBAL_SEED")
        if run_seed is not None:
            position = (self.current_epoch, batch_idx, self.global_rank)
            seed = int(np.random.SeedSequence((int(run_seed), *position)).generate_state(1)[0])
            np.random.seed(seed)
            torch.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        x_BCHW, y_B = batch
        self._batch_idx = batch_idx
        if self._mixup is None:
            loss = F.cross_entropy(self(x_BCHW).float(), y_B, label_smoothing=self.hparams["label_smoothing"])
        else:
            if len(x_BCHW) % 2:
                raise ValueError(
                    f"mixup pairs images and got a batch of {len(x_BCHW)} per device: make "
                    "data.batch_size / devices (or data.batch_size_per_device) even, or set model.mixup and cutmix to 0"
                )
            x_BCHW, y_BK = self._mixup(x_BCHW, y_B)
            loss = F.cross_entropy(self(x_BCHW).float(), y_BK)
        self._loss = loss.detach()
        self.log("train/loss", self._loss, prog_bar=True, batch_size=len(x_BCHW))
        self.log("train/lr", self._lr(), batch_size=len(x_BCHW))
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Under 16-mixed the scaler itself skips the steps whose scaled gradients overflow.
        judged = self._loss if self.trainer.precision == "16-mixed" else self._grad_norm
        may_step = self.may_step(
            loss=self._loss, norm=self._grad_norm, judged=judged, batch_idx=self._batch_idx, lr=self._lr()
        )
        if not may_step or not gradient_clip_val:
            return
        if gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        else:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.log("train/grad_norm", self._grad_norm, batch_size=len(batch[0]))

    def _lr(self) -> float:
        """Learning rate of the next step, before layer decay (the head's factor is 1)."""
        return max(group["lr"] for group in self.trainer.optimizers[0].param_groups)

    # ---------------------------------------------------------------- evaluation and prediction

    def on_validation_start(self) -> None:
        if self.class_names is None:
            self._take_classes(self._data_classes())
        self._check_classes(self._data_classes(), self.class_names)
        self.ensure_ema()

    def on_test_start(self) -> None:
        self.on_validation_start()

    def on_predict_start(self) -> None:
        if self.class_names is None:
            self._take_classes(self._data_classes())
        self.ensure_ema()
        if self.class_names is None and self.hparams["num_classes"] == 1000:
            # Published weights come without a class list; the order of the 1000 ImageNet classes is a convention.
            info = ImageNetInfo("imagenet-1k")
            self.class_names = [info.index_to_description(i) for i in range(1000)]

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names
        # The file the training once started from: its tensors are in this checkpoint, and it need not exist any more.
        checkpoint.get("hyper_parameters", {}).pop("weights", None)
        if self._trainer is not None:
            _resume_with_validation(self.trainer, checkpoint)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = checkpoint.get("class_names")
        if self._trainer is not None and self.trainer.training:
            self._check_classes(self.class_names, names)
        self.class_names = self.class_names if names is None else names
        super().on_load_checkpoint(checkpoint)


def _resume_with_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a training that is saved after a step, before the validation that follows it, resume with that validation.

    Lightning 2.6.6 would leave it out, and with it a row of metrics.csv and maybe the best checkpoint. It does repeat a
    validation that was interrupted, so its counters are saved as they stand in the first batch of one.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    done = loop.batch_progress.current
    if not trainer.training or fetcher is None or done.completed == done.processed:
        return
    if getattr(trainer, "_val_check_time_interval", None) is not None or not loop._should_check_val_fx(fetcher):
        return
    loops = checkpoint["loops"]["fit_loop"]
    for counters in ("total", "current"):
        loops["epoch_loop.batch_progress"][counters]["completed"] += 1
        first_batch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loops["epoch_loop.val_loop.batch_progress"][counters] = first_batch
    loops["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False

"""Averaged weights that begin later: their definition, their checkpoints, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from hornet_lit.module import ImageClassifier
from hornet_lit.writers import LearningCurves
from tests.training.test_module import NETWORK, TinyData, trainer

DECAY, START = 0.8, 1.5  # epochs of four steps
LATE = {"ema_decay": DECAY, "ema_start_epoch": START}


class Steps(pl.Callback):
    """The weights after every optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: ImageClassifier, *_: object) -> None:
        self.weights.append({name: p.detach().clone() for name, p in module.network.named_parameters()})


def fit(folder: Path, *, epochs: int = 3, resume: Path | None = None, **settings: object) -> ImageClassifier:
    torch.manual_seed(0)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = trainer(folder, max_epochs=epochs, callbacks=[saver, Steps()], enable_checkpointing=True)
    module = ImageClassifier(**NETWORK, lr=1e-2, **settings)
    run.fit(module, datamodule=TinyData(), ckpt_path=resume)
    return module


def test_an_average_begins_as_a_copy_and_resumes_across_its_beginning(tmp_path: Path) -> None:
    module = fit(tmp_path / "whole", **LATE)
    after = module.trainer.callbacks[0].weights
    expected = dict(after[5])  # the copy, after 1.5 epochs
    for weights in after[6:]:
        expected = {k: DECAY * expected[k] + (1 - DECAY) * weights[k] for k in expected}
    found = module.ema.state_dict(module.network)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)

    stored = {i: torch.load(tmp_path / "whole" / f"epoch={i}.ckpt", weights_only=True) for i in range(3)}
    assert stored[0]["ema"] == {"decay": DECAY, "state_dict": None}
    for i in (0, 1):  # before and after the beginning
        resumed = fit(tmp_path / f"from {i}", resume=tmp_path / "whole" / f"epoch={i}.ckpt", **LATE)
        again = torch.load(tmp_path / f"from {i}" / "epoch=2.ckpt", weights_only=True)
        assert resumed.global_step == 12
        for key, value in stored[2]["ema"]["state_dict"].items():
            assert torch.equal(value, again["ema"]["state_dict"][key]), key
        for key, value in stored[2]["state_dict"].items():
            assert torch.equal(value, again["state_dict"][key]), key


def test_resumes_that_would_drop_an_average_or_begin_it_late_are_refused(tmp_path: Path) -> None:
    fit(tmp_path, epochs=2, **LATE)
    early, begun = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"
    for checkpoint in (early, begun):
        with pytest.raises(ValueError, match=r"would be lost: set --model\.ema_decay 0\.8"):
            fit(tmp_path / "x", resume=checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint of step 4 has no averaged weights, but they should"):
        fit(tmp_path / "x", resume=early, ema_decay=DECAY, ema_start_epoch=0.5)
    fit(tmp_path / "y")
    with pytest.raises(ValueError, match=r"model\.ema_decay is set but the checkpoint has no averaged weights"):
        fit(tmp_path / "x", resume=tmp_path / "y" / "epoch=0.ckpt", **LATE)


def test_what_is_best_by_the_average_is_found_once_there_is_one(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val/acc1_ema", mode="max", filename="{epoch}", save_last=True)
    logger = pl.loggers.CSVLogger(tmp_path, name=None, version="")
    run = trainer(tmp_path, max_epochs=3, callbacks=[saver, LearningCurves()], logger=logger, enable_checkpointing=True)
    run.fit(ImageClassifier(**NETWORK, lr=1e-2, **LATE), datamodule=TinyData())
    assert Path(saver.best_model_path).name in ("epoch=1.ckpt", "epoch=2.ckpt")
    assert saver.best_model_score.isfinite()
    assert (tmp_path / "last.ckpt").exists() and (tmp_path / "curves.png").exists()


def test_a_beginning_that_cannot_be_waited_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would begin after 12 steps but the training takes 12"):
        fit(tmp_path, ema_decay=DECAY, ema_start_epoch=3)
    stopper = EarlyStopping(monitor="val/loss_ema")
    with pytest.raises(ValueError, match=r"EarlyStopping monitors 'val/loss_ema', which does not exist before"):
        trainer(tmp_path, max_epochs=3, callbacks=[stopper]).fit(
            ImageClassifier(**NETWORK, **LATE), datamodule=TinyData()
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_averages_of_a_compiled_network(tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled, eager = (fit(tmp_path / str(c), epochs=1, compile=c, ema_decay=DECAY) for c in (True, False))
    found, expected = (module.ema.state_dict(module.network) for module in (compiled, eager))
    assert found.keys() == expected.keys()
    for key, value in expected.items():  # AdamW makes whole steps, of 1e-2, of gradients that are little but rounding
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    scores = [module.trainer.callback_metrics["val/loss_ema"] for module in (compiled, eager)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)

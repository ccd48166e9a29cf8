"""A user's mistake: exit code 2, at most five lines that name it, the nearest valid name, no traceback."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from hornet_lit import cli, cli_classes
from hornet_lit.cli_errors import MAX_LINES, UserError, did_you_mean, shorten, told
from hornet_lit.recipes import find

from .conftest import Run

OPTIONS = [
    ("fitt", "unknown command 'fitt'", "did you mean 'fit'?"),
    ("--config digits fit", "option '--config' given before the command", "the command comes first"),
    ("fit", "fit needs data: give --config RECIPE", "`hornet-lit recipes` lists the recipes"),
    ("fit --config", "--config needs the name of a recipe, or a file", ""),
    ("fit --config digitz", "no file and no recipe is called 'digitz'", "did you mean 'digits'?"),
    ("fit --config digits --config dpp", "no recipe is called 'dpp'", "did you mean 'overlays/ddp'"),
    ("fit --config nope.yaml", "no file and no recipe is called 'nope.yaml'", "`hornet-lit recipes` lists"),
    ("fit --config https://a.b/c.yaml", "URLs are refused", ""),
    ("fit --config digits --model.lrr 1", "unknown option '--model.lrr'", "did you mean '--model.lr'?"),
    ("fit --config digits --model.lr abc", "--model.lr: expected float, got 'abc'", ""),
    ("fit --config digits --model.lr", "--model.lr: expected one argument", ""),
    ("fit --config digits --trainer.max_epoch 3", "unknown option '--trainer.max_epoch'", "'--trainer.max_epochs'"),
    ("fit --config digits --trainr.max_epochs 3", "unknown option '--trainr.max_epochs'", "'--trainer.max_epochs'"),
    ("fit --config digits --data.batch_sise 3", "unknown option '--data.batch_sise'", "'--data.batch_size'"),
    ("fit --config digits --data.batch_size x", "--data.batch_size: expected int, got 'x'", ""),
    ("fit --config digits --data.seed -1", "data.seed is -1: it must be at least 0", ""),
    ("fit --data.batch_size 3", "--data.batch_size needs a data module", "add --config RECIPE"),
    ("fit --config digits extra", "extra", ""),
    ("fit --config digits --data DigitDataModule", "unknown class 'DigitDataModule'", "'DigitsDataModule'"),
    ("fit --config digits --trainer.logger CSVLoger", "unknown class 'CSVLoger'", "'CSVLogger'"),
    ("fit --config digits --trainer.callbacks+ LearningCurve", "unknown class 'LearningCurve'", "'LearningCurves'"),
    ("fit --config digits --trainer.precision foo", "--trainer.precision: expected", "bf16-mixed"),
    ("fit --config digits --trainer.strategy foo", "invalid strategy name: `strategy='foo'`", ""),
    ("fit --config digits --trainer.devices 0", "not a valid input using cpu", ""),
    ("fit --config digits --trainer.use_distributed_sampler true", "use_distributed_sampler must be false", ""),
    ("fit --config digits --trainer.accumulate_grad_batches 3", "accumulate_grad_batches is 3", "leave"),
    ("fit --config digits --model.predict_weights foo", "expected one of auto, ema, raw, got 'foo'", ""),
    ("fit --config digits --model.network hornet_tny_7x7", "no network named 'hornet_tny_7x7'", "hornet_tiny_7x7"),
    ("fit --config digits --model.network_options.dephts 3", "takes no option 'dephts'", ""),
    (
        "fit --config digits --model.network convnext_atto",
        "convnext_atto takes no option 'img_size'",
        "set model.img_size null",
    ),
    ("fit --config digits --model.num_classes 7", "the data has 10 classes but model.num_classes is 7", ""),
    ("fit --config digits --model.weights nope.pth", "nope.pth", ""),
    ("fit --config finetune_folder", "no weight file at hornet_tiny_7x7.pth", "give yours as --model.weights FILE"),
    ("fit --config digits --model.in_chans 3", "model.in_chans is 3 but the images of Digits", "--model.in_chans 1"),
    ("fit --config hornet_t_in1k --model.ema_decay null", "ModelCheckpoint monitors 'val/acc1_ema'", "val/acc1"),
    ("fit --config hornet_t_in1k --data.root nowhere", "nowhere does not exist", "set data.root"),
    ("fit --config cifar10 --data.root nowhere", "no CIFAR-10 in nowhere", "data.download"),
    ("fit --config digits --model.lr null", "--model.lr: expected float, got null", "leave it out for 0.004"),
    ("fit --config digits --model.lr .inf", "model.lr is inf: it must be positive, and finite", ""),
    ("fit --config digits --trainer.callbacks os.system", "'os.system' is refused: it is of Python's own library", ""),
    ("fit --config digits --trainer.callbacks lightning.pytorch.Trainer", "Trainer' is no Callback", ""),
    ("fit --config digits --trainer.plugins os.system", "'os.system' is refused", "installed classes"),
    ("recipes show digitz", "no recipe is called 'digitz'", "'digits'"),
    ("recipes sow digits", "cannot read `recipes sow digits`", "recipes show NAME"),
]


@pytest.mark.parametrize(("words", "first", "hint"), OPTIONS, ids=[case[0] for case in OPTIONS])
def test_wrong_options(words: str, first: str, hint: str, run: Run) -> None:
    words = words if not words.startswith("fit ") else f"{words} --trainer.accelerator cpu"
    if words.startswith("fit --config --"):
        words = "fit --config"
    result = run(*shlex.split(words))
    assert result.code == 2
    assert len(result.error) <= MAX_LINES
    assert first in " ".join(result.error)
    assert hint in " ".join(result.error)
    assert "Traceback" not in result.err and "usage:" not in result.err


DAMAGES = [
    ("max_epochs", "max_epoks", "unknown key 'trainer.max_epoks' in mine.yaml", "'trainer.max_epochs'"),
    ("  lr: ", "  lrr: ", "unknown key 'model.lrr' in mine.yaml", "'model.lr'"),
    ("  lr: ", "  lr: a", "model.lr in mine.yaml: expected float, got 'a", ""),
    ("batch_size", "batch_sise", "unknown key 'data.init_args.batch_sise' in mine.yaml", "'data.init_args.batch_size'"),
    ("batch_size: ", "batch_size: x", "data.init_args.batch_size in mine.yaml: expected int, got 'x", ""),
    ("DigitsData", "DigitData", "unknown class 'hornet_lit.data.DigitDataModule'", "hornet_lit.data.DigitsDataModule"),
    ("hornet_lit.data.Dig", "hornet_lti.data.Dig", "unknown class 'hornet_lti.data.Dig", "hornet_lit.data"),
    ("ModelCheckpoint", "ModelCheckpont", "trainer.callbacks[0].class_path of mine.yaml", "callbacks.ModelCheckpoint"),
    ("monitor:", "monnitor:", "unknown key 'trainer.callbacks[0].init_args.monnitor'", "init_args.monitor"),
    ("monitor: val/acc1", "monitor: 3", "trainer.callbacks[0].init_args.monitor in mine.yaml: expected text", ""),
    ("mode: max", "mode: maxx", "`mode` can be min, max but got maxx", ""),
    ("CSVLogger", "CSVLoger", "unknown class 'lightning.pytorch.loggers.CSVLoger'", "loggers.CSVLogger"),
    ("save_dir", "savedir", "unknown key 'trainer.logger.init_args.savedir'", "trainer.logger.init_args.save_dir"),
    ("max_epochs: ", "max_epochs: x", "trainer.max_epochs in mine.yaml: expected int or null, got 'x", ""),
    ("trainer:", "trainr:", "unknown key 'trainr' in mine.yaml", "did you mean 'trainer'?"),
    ("data:", "dta:", "unknown key 'dta' in mine.yaml", "did you mean 'data'?"),
    ("model:", "model: 3\nx:", "model in mine.yaml: expected a mapping of options, got 3", ""),
    ("  lr: ", "  lr: [", "mine.yaml is not valid YAML at line", ""),
    ("seed_everything: 0", "- 1\n#", "mine.yaml is not valid YAML", ""),
    ("    batch_size: 48", "    batch_size:", "data.init_args.batch_size in mine.yaml: expected int, got null", ""),
    ("max_epochs: 14", "max_epochs: -5", "trainer.max_epochs in mine.yaml is -5: `max_epochs` must be", ""),
]


@pytest.mark.parametrize(("old", "new", "first", "hint"), DAMAGES, ids=[case[1].strip() for case in DAMAGES])
def test_damaged_recipes(old: str, new: str, first: str, hint: str, run: Run) -> None:
    recipe = find("digits")
    assert recipe is not None
    text = recipe.path.read_text(encoding="utf-8")
    head, found, rest = text.partition("\nseed_everything")  # the comments stay as they are
    damaged = (found + rest).replace(old, new, 1)
    assert damaged != found + rest
    Path("mine.yaml").write_text(head + damaged, encoding="utf-8")
    result = run("fit", "--config", "mine.yaml", "--trainer.accelerator", "cpu")
    assert result.code == 2
    assert len(result.error) <= MAX_LINES
    assert first in " ".join(result.error)
    assert hint in " ".join(result.error)
    assert "Traceback" not in result.err and "usage:" not in result.err


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"just words", b"\xff\xfe\x00", b"1: 2"])
def test_files_that_are_no_recipes(content: bytes, run: Run) -> None:
    Path("mine.yaml").write_bytes(content)
    result = run("fit", "--config", "mine.yaml")
    assert result.code == 2 and len(result.error) <= MAX_LINES and "mine.yaml is not" in result.error[0]


def test_classes_of_installed_packages_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same module, first beside the recipe, then as one that is installed."""
    module = "from lightning.pytorch import Callback\nfrom pathlib import Path\nPath('ran').touch()\n"
    Path("mine_not.py").write_text(module + "class Mine(Callback): pass")
    monkeypatch.syspath_prepend(Path.cwd())
    words = ["fit", "--config", "digits", "--trainer.callbacks+", "mine_not.Mine", "--print_config"]
    result = run(*words)
    assert result.code == 2 and "mine_not.py is not an installed package" in result.error[0]
    assert "pip install -e" in " ".join(result.error) and not Path("ran").exists()
    monkeypatch.setattr(cli_classes, "_site_folders", lambda: (Path.cwd(),))
    result = run(*words)
    assert result.code == 0 and "mine_not.Mine" in result.out, result.err


def test_functions_are_refused(run: Run) -> None:
    callback = {"class_path": "LambdaCallback", "init_args": {"on_fit_start": "torch.hub.load"}}
    result = run("fit", "--config", "digits", "--trainer.callbacks", json.dumps([callback]))
    assert result.code == 2 and "the function load is refused" in result.error[0]


def test_names_in_files_cannot_steer_the_terminal(run: Run) -> None:
    Path("mine.yaml").write_text('"lr\\e[31m\\u202E": 1')
    result = run("fit", "--config", "mine.yaml")
    assert result.code == 2 and "\x1b" not in result.err and "\u202e" not in result.err
    assert "lr\\x1b[31m" in result.error[0]


def test_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hornet_lit.module import ImageClassifier

    def setup(self: ImageClassifier, stage: str) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(ImageClassifier, "setup", setup)
    with pytest.raises(KeyError, match="a bug"):
        run("fit", "--config", "digits", "--trainer.accelerator", "cpu", "--trainer.logger", "false")


def test_debug_variable_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORNET_LIT_DEBUG", "1")
    with pytest.raises(UserError, match="digitz"):
        run("fit", "--config", "digitz")


def test_a_loss_that_is_not_finite_is_told_and_exits_1(run: Run) -> None:
    words = [
        "--model.lr",
        "1e30",
        "--model.warmup_epochs",
        "0",
        "--trainer.fast_dev_run",
        "6",
        "--trainer.devices",
        "1",
    ]
    network = ["--model.network_options", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--trainer.accelerator", "cpu"]
    result = run("fit", "--config", "digits", *words, *network, "--trainer.gradient_clip_val", "null")
    assert result.code == 1
    assert "training stopped at batch" in result.error[0] and "Traceback" not in result.err


def test_an_unreadable_image_in_a_worker_is_told(run: Run, images: Path, weights: Path, tmp_path: Path) -> None:
    """A worker process sends its exception as text; it is a user's mistake all the same."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes((images / "train/cat/0000.png").read_bytes())
    broken = root / "train" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    small = ["--model.network", "hornet_pico_32", "--model.weights", weights, "--data.img_size", "32"]
    small += ["--model.network_options", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--data.batch_size", "2"]
    small += ["--model.warmup_epochs", "0", "--trainer.fast_dev_run", "1", "--model.img_size", "32"]
    words = ["--data.root", root, "--data.num_workers", "1", "--trainer.accelerator", "cpu"]
    result = run("fit", "--config", "finetune_folder", *words, *small)
    assert result.code == 2
    assert len(result.error) <= MAX_LINES and str(broken) in " ".join(result.error)
    assert "Traceback" not in result.err


def test_shorten() -> None:
    assert shorten("a\n\n  b  \n") == "a\n  b"
    lines = shorten("\n".join(map(str, range(20)))).splitlines()
    assert len(lines) == MAX_LINES and "16 more lines" in lines[-1]
    assert len(shorten("x" * 10_000)) <= 400


def test_did_you_mean() -> None:
    valid = ["model.lr", "model.min_lr", "trainer.max_epochs", "data"]
    assert did_you_mean("model.lrr", valid) == "model.lr"
    assert did_you_mean("trainer.max_epoch", valid) == "trainer.max_epochs"
    assert did_you_mean("lr", valid) == "model.lr"
    assert did_you_mean("dta", valid) == "data"
    assert did_you_mean("zzz", valid) is None


def test_told_tells_only_mistakes() -> None:
    assert told(ValueError("from elsewhere"), constructing=False) is None
    assert str(told(ValueError("from elsewhere"), constructing=True)) == "from elsewhere"
    assert told(KeyError("x"), constructing=True) is None
    assert str(told(FileNotFoundError(2, "No such file", "a.txt"), constructing=False)) == "a.txt: No such file"
    assert told(RuntimeError("CUDA out of memory"), constructing=False) is None
    mistake = UserError("x")
    assert told(mistake, constructing=False) is mistake


def test_exit_codes_of_others_pass_through(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(command: str, words: list[str]) -> None:
        raise SystemExit(143)

    monkeypatch.setitem(cli.COMMANDS, "recipes", stop)
    assert run("recipes").code == 143

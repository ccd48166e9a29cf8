"""Every recipe: its settings against the published ones, its batch sums, and two steps on tiny data in its format."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hornet_lit import recipes
from hornet_lit.data.batching import split_batch
from hornet_lit.network.build import build_network

from .conftest import SHORT, SMALL_NETWORK, Run

RECIPES = [recipe for recipe in recipes.all_recipes() if not recipe.is_overlay]
OVERLAYS = [recipe for recipe in recipes.all_recipes() if recipe.is_overlay]
by_name = {"ids": lambda recipe: recipe.name.replace("/", "-")}

# hornet.md §3: network, drop path, clip norm, GPUs, images per GPU, accumulation, RandAugment
PUBLISHED = {
    "hornet_t_in1k": ("hornet_tiny_7x7", 0.2, 100, 32, 128, 1, "rand-m9-mstd0.5-inc1"),
    "hornet_t_gf_in1k": ("hornet_tiny_gf", 0.2, 1, 32, 128, 1, "rand-m9-mstd0.5-inc1"),
    "hornet_s_in1k": ("hornet_small_7x7", 0.4, 5, 32, 64, 2, "rand-m9-mstd0.5-inc1"),
    "hornet_s_gf_in1k": ("hornet_small_gf", 0.4, 1, 32, 64, 2, "rand-m12-mstd0.5-inc1"),
    "hornet_b_in1k": ("hornet_base_7x7", 0.5, 5, 32, 64, 2, "rand-m9-mstd0.5-inc1"),
    "hornet_b_gf_in1k": ("hornet_base_gf", 0.5, 1, 32, 64, 2, "rand-m15-mstd0.5-inc1"),
    "hornet_l_in22k": ("hornet_large_7x7", 0.2, 5, 64, 32, 2, "rand-m9-mstd0.5-inc1"),
    "hornet_l_gf_in22k": ("hornet_large_gf", 0.2, 1, 64, 32, 2, "rand-m9-mstd0.5-inc1"),
    "hornet_l_ft_in1k_384": ("hornet_large_7x7", 0.4, 1, 32, 16, 1, "rand-m9-mstd0.5-inc1"),
    "hornet_l_gf_ft_in1k_384": ("hornet_large_gf_img384", 0.4, 1, 32, 16, 1, "rand-m9-mstd0.5-inc1"),
}
# per family: epochs, warm-up epochs, lr, weight decay, mixup, CutMix, EMA, layer decay, classes, side
FAMILIES = {
    "in1k": (300, 20, 4e-3, 0.05, 0.8, 1.0, 0.9999, None, 1000, 224),
    "in22k": (90, 5, 4e-3, 0.1, 0.8, 1.0, None, None, 10459, 224),
    "384": (30, 0, 5e-5, 1e-8, 0.0, 0.0, 0.9999, 0.7, 1000, 384),
}


def read(recipe: recipes.Recipe) -> dict[str, Any]:
    return yaml.safe_load(recipe.path.read_text(encoding="utf-8"))


def test_all_published_recipes_are_there() -> None:
    assert set(PUBLISHED) < {recipe.name for recipe in RECIPES}
    assert {"digits", "cifar10", "cifar100", "cifar10_quick", "finetune_folder"} <= {recipe.name for recipe in RECIPES}
    sets = {"imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_real"}
    assert {r.path.stem for r in OVERLAYS} == {"ddp", "fsdp", "bf16", "compile", "debug", "slurm"} | sets


@pytest.mark.parametrize("recipe", RECIPES, **by_name)
def test_header_and_common_settings(recipe: recipes.Recipe) -> None:
    assert recipe.title and recipe.result and recipe.cost
    assert f"# Command: hornet-lit fit --config {recipe.name}" in recipe.path.read_text(encoding="utf-8")
    values = read(recipe)
    assert list(values) == ["seed_everything", "trainer", "model", "data"]
    assert values["trainer"]["use_distributed_sampler"] is False
    assert values["trainer"]["logger"]["init_args"] == {"save_dir": "runs", "name": recipe.name}
    assert "accumulate_grad_batches" not in values["trainer"]  # follows from data.batch_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    network, drop_path, clip, gpus, images, accumulation, augment = PUBLISHED[name]
    epochs, warmup, lr, decay, mixup, cutmix, ema, layer_decay, classes, side = FAMILIES[name.split("_")[-1]]
    recipe = recipes.find(name)
    assert recipe is not None
    values = read(recipe)
    trainer, model, data = values["trainer"], values["model"], values["data"]["init_args"]
    assert (model["network"], model["drop_path_rate"], trainer["gradient_clip_val"]) == (network, drop_path, clip)
    assert (trainer["max_epochs"], model["warmup_epochs"], model["lr"], model["min_lr"]) == (epochs, warmup, lr, 1e-6)
    assert (model["weight_decay"], model["mixup"], model["cutmix"]) == (decay, mixup, cutmix)
    assert (model["ema_decay"], model.get("layer_decay"), model["label_smoothing"]) == (ema, layer_decay, 0.1)
    assert (model["num_classes"], model["img_size"], data["img_size"]) == (classes, side, side)
    assert (data["auto_augment"], data["reprob"], data["remode"]) == (augment, 0.25, "pixel")
    assert (data["color_jitter"], data["interpolation"]) == (0.4, "bicubic")
    assert trainer["precision"] == "32-true"

    sizes = {"batch_size": data["batch_size"], "batch_size_per_device": data["batch_size_per_device"]}
    assert data["batch_size"] == gpus * images * accumulation
    assert split_batch(world=gpus, **sizes) == (images, accumulation)
    share = data["batch_size"] // 64
    assert split_batch(world=64, **sizes) == (min(share, images), max(share // images, 1))
    assert split_batch(world=8, **sizes) == (images, accumulation * gpus // 8)
    assert split_batch(world=1, **sizes) == (images, accumulation * gpus)
    with pytest.raises(ValueError, match=r"does not divide over 7 devices"):
        split_batch(world=7, **sizes)


@pytest.mark.parametrize("recipe", RECIPES, **by_name)
def test_the_real_network_can_be_built(recipe: recipes.Recipe) -> None:
    """With the recipe's own options, on the meta device: the large ones would take gigabytes."""
    model = read(recipe)["model"]
    with torch.device("meta"):
        network = build_network(
            model["network"],
            num_classes=model["num_classes"] or 10,
            in_chans=model.get("in_chans", 3),
            img_size=model["img_size"],
            drop_path_rate=model["drop_path_rate"],
            options=model.get("network_options"),
        )
    assert sum(p.numel() for p in network.parameters()) > 100_000


@pytest.mark.parametrize("recipe", RECIPES, **by_name)
def test_two_steps_in_its_own_format(
    recipe: recipes.Recipe, run: Run, images: Path, cifar100: Path, weights: Path
) -> None:
    """Everything as the recipe says, but a small network and 8 images a step on tiny images."""
    values = read(recipe)
    words = [*SHORT, *SMALL_NETWORK, "--data.batch_size", "8", "--data.eval_batch_size", "8"]
    if values["data"]["class_path"] != "hornet_lit.data.DigitsDataModule":
        words += ["--data.root", str(cifar100 if recipe.name == "cifar100" else images)]
    if values["data"]["class_path"] == "hornet_lit.data.ImageNetDataModule":
        words += ["--data.img_size", "32", "--data.num_workers", "0", "--data.batch_size_per_device", "4"]
        words += ["--model.num_classes", "10", "--trainer.limit_train_batches", "4"]  # 2 steps of 2 batches of 4
    if values["model"].get("weights"):
        words += ["--model.weights", str(weights)]
    result = run("fit", "--config", recipe.name, *words)
    assert result.code == 0, result.err[-2000:]

    folder = Path("runs", recipe.name, "version_0")
    monitored = values["trainer"]["callbacks"][0]["init_args"]["monitor"]
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert any(row.get(monitored) for row in rows), f"{monitored} was never logged"
    assert any((folder / "checkpoints").glob("epoch*-step2.ckpt"))
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "curves.png").is_file() and (folder / "config.yaml").is_file()


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name in ("finetune_folder", "hornet_t_in1k")], **by_name)
@pytest.mark.parametrize("overlay", OVERLAYS, **by_name)
def test_overlays_change_what_they_state_and_keep_the_rest(
    overlay: recipes.Recipe, recipe: recipes.Recipe, run: Run
) -> None:
    whole = run("fit", "--config", recipe.name, "--config", overlay.path.stem, "--print_config")
    assert whole.code == 0, whole.err
    both, alone = yaml.safe_load(whole.out), read(recipe)
    classes = [callback["class_path"].rpartition(".")[2] for callback in both["trainer"]["callbacks"]]
    assert classes == ["ModelCheckpoint", "LearningCurves", "PredictionSheet"]
    stated = read(overlay)
    for room in ("trainer", "model"):
        for key, value in stated.get(room, {}).items():
            given = both[room][key]
            assert given == value or given["class_path"] == value["class_path"], key
        for key in set(alone[room]) - set(stated.get(room, {})) - {"callbacks", "logger"}:
            assert both[room][key] == alone[room][key], key
    data = alone["data"]["init_args"] | stated.get("data", {}).get("init_args", {})
    assert both["data"]["class_path"] == alone["data"]["class_path"]
    assert {key: both["data"]["init_args"][key] for key in data} == data


@pytest.mark.parametrize("name", ["digits", "hornet_t_in1k"])
def test_callbacks_plus_appends(name: str, run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.Timer\n")
    result = run("fit", "--config", name, "--config", mine, "--print_config")
    callbacks = yaml.safe_load(result.out)["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        "ModelCheckpoint",
        "LearningCurves",
        "PredictionSheet",
        "Timer",
    ]


@pytest.mark.parametrize("overlay", ["bf16", "debug", "fsdp", "ddp"])
def test_overlays_run(overlay: str, run: Run) -> None:
    """Here ddp and fsdp have one process; compile takes minutes, and slurm needs a cluster."""
    words = [*SHORT, *SMALL_NETWORK] if overlay != "debug" else SMALL_NETWORK
    result = run("fit", "--config", "digits", "--config", overlay, *words)
    assert result.code == 0, result.err[-2000:]
    if overlay == "debug":
        assert list(Path().iterdir()) == [], "the debug overlay leaves nothing behind"
    else:
        assert Path("runs/digits/version_0/checkpoints/last.ckpt").is_file()

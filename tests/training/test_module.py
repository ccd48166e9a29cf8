"""The LightningModule's promises beyond the golden run: stops, refusals, frozen parts, averaged weights, imports."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from timm.optim import muon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import hornet_lit
from hornet_lit.module import ImageClassifier
from hornet_lit.network.build import build_network
from hornet_lit.optim import Ema, WarmupCosine, build_optimizer
from tests.conftest import images

NETWORK = {"network": "hornet_pico_32", "network_options": {"base_dim": 16, "depths": [1, 1, 1, 1]}}


class TinyData(pl.LightningDataModule):
    def __init__(self, *, names: str = "abc", size: int = 16, batch: int = 4) -> None:
        super().__init__()
        self.class_names, self.batch, self.size = list(names), batch, size
        self.x = images(0, size, 3, 32, 32)
        self.y = torch.arange(size) % len(names)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch)

    val_dataloader = test_dataloader = train_dataloader

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch


def trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        **({"enable_checkpointing": False, "max_epochs": 2} | quiet | kwargs),
    )


def test_classes_come_from_the_data_and_stay_in_the_checkpoint(tmp_path) -> None:
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(ImageClassifier(**NETWORK), datamodule=TinyData(names="abc"))
    path = tmp_path / "x.ckpt"
    fitted.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["num_classes"] == 3
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert loaded.class_names == ["a", "b", "c"] and loaded(images(0, 1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"not in both: c, d"):
        trainer(tmp_path).validate(ImageClassifier(**NETWORK), datamodule=TinyData(names="abd"), ckpt_path=path)
    with pytest.raises(
        ValueError, match=r"the data has 3 classes but model\.num_classes is 7: set --model\.num_classes 3"
    ):
        trainer(tmp_path).fit(ImageClassifier(**NETWORK, num_classes=7), datamodule=TinyData())


@pytest.mark.parametrize("before,after,message", [(0.9, None, "would be lost"), (None, 0.9, "has no averaged weights")])
def test_a_resume_that_would_drop_or_invent_averages_is_refused(tmp_path, before, after, message) -> None:
    first = trainer(tmp_path, max_epochs=1)
    first.fit(ImageClassifier(**NETWORK, ema_decay=before), datamodule=TinyData())
    first.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"cannot resume.*{message}"):
        trainer(tmp_path).fit(
            ImageClassifier(**NETWORK, ema_decay=after), datamodule=TinyData(), ckpt_path=tmp_path / "x.ckpt"
        )


def test_both_sets_of_weights_are_validated_and_loadable(tmp_path) -> None:
    torch.manual_seed(0)
    first = trainer(tmp_path)
    module = ImageClassifier(**NETWORK, ema_decay=0.5, lr=1e-2)
    first.fit(module, datamodule=TinyData())
    seen = {k: float(v) for k, v in first.callback_metrics.items()}
    assert seen["val/loss"] != seen["val/loss_ema"]
    first.save_checkpoint(tmp_path / "x.ckpt")
    for ema, loss in ((True, "val/loss_ema"), (False, "val/loss")):
        network = ImageClassifier(**NETWORK, num_classes=3)
        network.configure_model()
        report = hornet_lit.load_weights(network.network, tmp_path / "x.ckpt", ema=ema)
        assert report.weights == ("EMA" if ema else "raw")
        (alone,) = trainer(tmp_path).validate(network, datamodule=TinyData(), verbose=False)
        assert alone["val/loss"] == pytest.approx(seen[loss], rel=1e-5)


def test_linear_probe_moves_the_classifier_alone(tmp_path) -> None:
    module = ImageClassifier(**NETWORK, num_classes=3, freeze_backbone=True, lr=1e-2, drop_path_rate=0.5)
    module.configure_model()
    before = {k: v.clone() for k, v in module.network.state_dict().items()}
    trainer(tmp_path).fit(module, datamodule=TinyData())
    moved = {k for k, v in module.network.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.weight", "head.bias"}


def test_mixup_pairs_and_says_so(tmp_path) -> None:
    mixed = ImageClassifier(**NETWORK, mixup=0.8, cutmix=1.0)
    trainer(tmp_path).fit(mixed, datamodule=TinyData())
    with pytest.raises(ValueError, match="mixup pairs images and got a batch of 3"):
        trainer(tmp_path).fit(ImageClassifier(**NETWORK, mixup=0.8), datamodule=TinyData(names="ab", size=12, batch=3))


def test_compiled_in_place_keeps_the_names(tmp_path) -> None:
    torch._dynamo.reset()
    module = ImageClassifier(**NETWORK, compile=True, num_classes=3)
    module.configure_model()
    plain = ImageClassifier(**NETWORK, num_classes=3)
    plain.configure_model()
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert module.network._compiled_call_impl is not None


def test_any_network_of_timm_trains(tmp_path) -> None:
    module = ImageClassifier(network="resnet10t", lr=1e-3, ema_decay=0.9)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=TinyData())
    with pytest.raises(ValueError, match=r"no network named 'hornet_tiny_7x8': did you mean hornet_tiny_7x7"):
        ImageClassifier(network="hornet_tiny_7x8", num_classes=3).configure_model()
    with pytest.raises(
        ValueError, match=r"model\.img_size: resnet18 takes no option 'img_size': set model\.img_size null"
    ):
        build_network("resnet18", num_classes=2, img_size=32)
    with pytest.raises(ValueError, match=r"takes no option 'dephts': did you mean 'depths'\?"):
        ImageClassifier(network="hornet_pico_32", network_options={"dephts": 3}, num_classes=3).configure_model()


def test_starting_weights_are_reported_and_must_fit_unless_trained(tmp_path, official_file) -> None:
    source = ImageClassifier(**NETWORK, num_classes=5)
    source.configure_model()
    path = str(official_file(source.network))
    module = ImageClassifier(**NETWORK, weights=path, num_classes=3)
    module.configure_model()
    assert not module.network.head.weight.any() and not module.network.head.bias.any(), "every class begins alike"
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=TinyData())
    assert module.network.head.weight.any()
    with pytest.raises(ValueError, match="has no classifier for these 3 classes"):
        trainer(tmp_path).validate(ImageClassifier(**NETWORK, weights=path), datamodule=TinyData())


@pytest.mark.parametrize("setting", [{"lr": 0.0}, {"weight_decay": -1.0}, {"drop_path_rate": 2.0}, {"mix_prob": -0.1}])
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"model\.{next(iter(setting))} is "):
        ImageClassifier(**setting)


class TypesOfProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if "mm" in operation.name():
            self.types |= {t.dtype for t in arguments if isinstance(t, torch.Tensor)}
        return operation(*arguments, **(options or {}))


def test_muon_steps_orthogonally_where_there_is_a_matrix_and_as_adamw_elsewhere() -> None:
    torch.manual_seed(0)
    timms = muon.zeropower_via_newtonschulz
    network = build_network("hornet_femto_32", num_classes=10, in_chans=3, img_size=32, options=None)
    optimizer = build_optimizer(network, optimizer="muon", lr=0.1, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    with TypesOfProducts() as seen:
        optimizer.step()
    assert seen.types == {torch.float32}, "most CPUs multiply bfloat16 many times more slowly"
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert muon.zeropower_via_newtonschulz is timms, "timm's function stays replaced"
    steps = {name: (p.detach() - before[name]) / 0.1 for name, p in network.named_parameters()}
    for name in ("stages.1.0.gnconv.proj_in.weight", "stages.2.1.pwconv2.weight", "downsample_layers.1.1.weight"):
        singular = torch.linalg.svdvals(steps[name].flatten(1)) / (0.2 * max(steps[name].flatten(1).shape) ** 0.5)
        assert singular.min() > 0.5 and singular.max() < 1.5, name  # Newton and Schulz's polynomial ends near 1
    for name in ("stages.1.0.gnconv.dwconv.weight", "stages.1.0.norm1.bias", "stages.1.0.gamma1"):
        torch.testing.assert_close(steps[name].abs(), torch.ones_like(steps[name]), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        build_optimizer(network, optimizer="sgd", lr=0.1, weight_decay=0.0)


def test_a_step_of_muon_calls_its_hooks_once_after_loading_too() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), optimizer="muon", lr=0.1, weight_decay=0.0)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    for loads in (False, True):
        if loads:
            optimizer.load_state_dict(optimizer.state_dict())
        calls.clear()
        weight.grad = torch.randn(4, 4)
        optimizer.step()
        assert calls == ["step"]


def test_muon_resumes_where_it_was(tmp_path) -> None:
    def fitted(epochs: int, **kwargs: Any) -> pl.Trainer:
        torch.manual_seed(0)
        run = trainer(tmp_path, max_epochs=epochs)
        module = ImageClassifier(**NETWORK, optimizer="muon", lr=1e-2, min_lr=1e-2)  # one rate, whatever epochs
        run.fit(module, datamodule=TinyData(), **kwargs)
        return run

    fitted(1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(2, ckpt_path=tmp_path / "half.ckpt").lightning_module.state_dict()
    for name, value in fitted(2).lightning_module.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_schedule_is_the_published_one() -> None:
    def published(step: int, total: int, warmup: int, peak: float, low: float) -> float:
        import math

        if step < warmup:
            return peak * step / max(warmup - 1, 1)
        return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    parameter = torch.nn.Parameter(torch.zeros(2))
    for total, warmup in ((12, 4), (10, 0), (5, 1), (6, 6)):
        optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.4, "lr_scale": 0.5}])
        scheduler = WarmupCosine(optimizer, total_steps=total, warmup_steps=warmup, min_lr=1e-3)
        for step in range(total):
            scheduler.step_update(step)
            expected = published(step, total, warmup, 0.4, 1e-3)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * expected, abs=1e-12)
    with pytest.raises(ValueError, match=r"warm-up takes 9 steps but the training only 5"):
        WarmupCosine(torch.optim.SGD([parameter], lr=0.1), total_steps=5, warmup_steps=9)


def test_averages_follow_their_definition_and_swap_back_on_errors() -> None:
    network = torch.nn.Linear(3, 2).bfloat16()
    ema = Ema(network, decay=0.9)
    expected = {k: v.detach().float().clone() for k, v in network.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        ema.update(network)
        expected = {k: 0.9 * expected[k] + 0.1 * v.detach().float() for k, v in network.named_parameters()}
    state = ema.state_dict(network)
    for k, v in expected.items():
        assert state[k].dtype == torch.float32
        torch.testing.assert_close(state[k], v)
    raw = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(KeyError), ema.swapped(network):
        torch.testing.assert_close(network.weight.float(), expected["weight"], rtol=1e-2, atol=1e-2)
        raise KeyError
    assert all(torch.equal(v, raw[k]) for k, v in network.state_dict().items())


ALLOWED = {
    "network": {"network"},
    "data": {"data"},
    "writers": {"writers"},
    "optim": {"optim"},
    "bench": {"bench", "network"},
    "durable": {"durable"},
    "last": {"last"},
    "guard": {"guard", "last"},
    "sharded": {"sharded", "durable"},
    "strategy": {"strategy", "sharded", "durable"},
    "recipes": {"recipes"},
    "evaluation": {"evaluation", "optim"},
    "averaging": {"averaging", "optim"},
    "module": {"module", "network", "optim", "evaluation", "averaging", "guard", "last"},
}


def test_imports_run_one_way() -> None:
    package = Path(hornet_lit.__file__).parent
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room.startswith(("cli", "__")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.level <= 1, f"{path.name} imports from outside its room by dots"
                names = [node.module] if node.level == 0 else []
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("hornet_lit."):
                    assert name.split(".")[1] in ALLOWED[room], f"{path.name} imports {name}"

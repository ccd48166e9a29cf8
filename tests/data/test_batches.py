"""Batch arithmetic, samplers, padding and what arrives on the device."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from hornet_lit.data import CIFARDataModule, DigitsDataModule
from hornet_lit.data.batching import split_batch
from hornet_lit.data.sampling import EvalSampler, TrainSampler, pass_batch
from hornet_lit.data.tensors import TensorImages
from hornet_lit.data.transforms import KeyedRandomErasing

from .recorder import Recorder, make_trainer


@given(st.integers(1, 5000), st.integers(1, 64), st.none() | st.integers(1, 300))
def test_split_multiplies_back_or_names_a_batch_that_works(batch_size: int, world: int, cap: int | None) -> None:
    try:
        micro, accumulation = split_batch(batch_size=batch_size, world=world, batch_size_per_device=cap)
    except ValueError as error:
        message = str(error)
        proposed = int(message.split("data.batch_size to ")[1].split()[0].rstrip(","))
        split_batch(batch_size=proposed, world=world, batch_size_per_device=cap if "no multiple" in message else None)
        if "batch_size_per_device to " in message:
            fits = int(message.split("batch_size_per_device to ")[1].split(",")[0])
            split_batch(batch_size=batch_size, world=world, batch_size_per_device=fits)
        return
    assert world * micro * accumulation == batch_size
    assert cap is None or micro <= cap
    assert accumulation == 1 or micro == cap


@pytest.mark.parametrize(
    ("batch_size", "world", "cap", "expected"),
    [
        (4096, 32, 128, (128, 1)),  # the published sums, hornet.md §3
        (4096, 32, 64, (64, 2)),
        (4096, 64, 32, (32, 2)),
        (512, 32, 16, (16, 1)),
        (4096, 1, 128, (128, 32)),
        (4096, 8, None, (512, 1)),
    ],
)
def test_published_batches(batch_size: int, world: int, cap: int | None, expected: tuple[int, int]) -> None:
    assert split_batch(batch_size=batch_size, world=world, batch_size_per_device=cap) == expected


def test_fit_sets_accumulation_and_counts_steps_as_the_trainer_does() -> None:
    for options, loop_steps in (({}, 8), ({"limit_train_batches": 5}, 5), ({"limit_train_batches": 0.8}, 6)):
        data = DigitsDataModule(batch_size=480, batch_size_per_device=120)
        trainer = make_trainer(max_epochs=1, limit_val_batches=0, **options)
        trainer.fit(Recorder(), datamodule=data)
        assert trainer.accumulate_grad_batches == data.accumulation == 4
        assert trainer.num_training_batches == loop_steps
        assert data.steps_per_epoch == trainer.global_step


def test_no_more_loader_processes_than_cores_or_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    data = DigitsDataModule(num_workers=10, batch_size=48, eval_batch_size=360)
    data.setup("fit")
    assert (data.train_dataloader().num_workers, data.val_dataloader().num_workers) == (3, 1)
    data.num_workers = 0
    assert data.train_dataloader().num_workers == 0


def test_batch_sizes_that_cannot_be() -> None:
    def fit(accumulate: int = 1, **options: int) -> None:
        trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
        trainer.fit(Recorder(), datamodule=DigitsDataModule(**options))

    with pytest.raises(ValueError, match=r"accumulate_grad_batches is 3, .* takes 2"):
        fit(3, batch_size=64, batch_size_per_device=32)
    with pytest.raises(ValueError, match=r"set data\.batch_size_per_device to 32, or data\.batch_size to 80"):
        fit(batch_size=64, batch_size_per_device=40)
    with pytest.raises(ValueError, match="1437 images, fewer than one global batch of 2000"):
        fit(batch_size=2000)
    with pytest.raises(ValueError, match=r"does not divide over 3 devices: set data\.batch_size to 63"):
        split_batch(batch_size=64, world=3)


def test_lightnings_own_sampler_is_refused_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DigitsDataModule()
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector, callbacks=[])
    with pytest.raises(ValueError, match=r"trainer\.use_distributed_sampler must be false"):
        data.setup("validate")


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_every_optimizer_step_alike(world: int) -> None:
    """The images of an optimizer step are the same set for any number of ranks, and an epoch has no image twice."""

    def steps(world: int) -> list[set[int]]:
        ranks = [list(TrainSampler(size=50, batch_size=12, world=world, rank=r, seed=3, epoch=5)) for r in range(world)]
        assert {epoch for keys in ranks for epoch, _ in keys} == {5}
        share = 12 // world
        return [{index for keys in ranks for _, index in keys[s * share : (s + 1) * share]} for s in range(4)]

    assert steps(world) == steps(1)
    assert [len(step) for step in steps(world)] == [12] * 4
    assert len(set().union(*steps(world))) == 48


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9))
def test_evaluation_deals_out_the_batches_of_one_process(size: int, world: int, batch_size: int) -> None:
    data = TensorImages(torch.zeros(size, 1, 2, 2, dtype=torch.uint8), torch.arange(size))
    dealt, counts = [], set()
    for rank in range(world):
        sampler = EvalSampler(size=size, batch_size=batch_size, world=world, rank=rank)
        loader = DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=pass_batch)
        batches = [tuple(y_B.tolist()) for _, y_B in loader]
        assert len(batches) == len(loader)
        counts.add(len(batches))
        dealt += [batch for batch in batches if set(batch) != {-1}]
    assert len(counts) == 1, "ranks with different numbers of batches hang in collective calls"
    assert sorted(dealt) == [tuple(range(i, min(i + batch_size, size))) for i in range(0, size, batch_size)]


def test_normalise_has_torchvisions_bits_and_comes_back() -> None:
    data = CIFARDataModule(root="unused")
    x_BCHW = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    reference = tv.Compose([tv.ToTensor(), tv.Normalize(data.mean, data.std)])
    expected = torch.stack([reference(tv.functional.to_pil_image(x_CHW)) for x_CHW in x_BCHW])
    normalised = data.normalise(x_BCHW)
    assert torch.equal(normalised, expected)
    assert torch.equal(data.denormalise(normalised), x_BCHW)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_precision_of_the_batches(precision: str, dtype: torch.dtype) -> None:
    class Check(Recorder):
        def training_step(self, batch, batch_idx):
            assert batch[0].dtype == dtype and batch[1].dtype == torch.int64
            return self.bias_K.sum()

    trainer = make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, precision=precision)
    trainer.fit(Check(), datamodule=DigitsDataModule())
    assert trainer.global_step == 1


def test_random_erasing_depends_on_its_key_alone() -> None:
    erase = KeyedRandomErasing(probability=1.0, mode="pixel")
    x_BCHW = torch.zeros(6, 3, 32, 32)
    before = torch.get_rng_state()
    first, second, other = (
        erase(x_BCHW.clone(), 0, 1, 2),
        erase(x_BCHW.clone(), 0, 1, 2),
        erase(x_BCHW.clone(), 0, 1, 3),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second) and not torch.equal(first, other)
    share_B = (first != 0).any(1).float().mean((1, 2))
    assert ((share_B > 0.01) & (share_B < 0.36)).all(), "timm erases 2 % to a third of an image"


def test_erasing_only_in_training() -> None:
    class Count(Recorder):
        zeros: list[int]

        def on_fit_start(self) -> None:
            self.zeros = []

        def validation_step(self, batch):
            self.validated = batch[0]

    data = CIFARDataModule(root="unused", batch_size=8, reprob=1.0, remode="const", padding=0, hflip=0.0)
    images = TensorImages(torch.full((8, 3, 32, 32), 9, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    data.train_set = data.val_set = images
    module = Count()
    fed = []
    module.training_step = lambda batch, batch_idx: fed.append(batch[0]) or module.bias_K.sum()  # type: ignore[assignment]
    make_trainer(max_epochs=1).fit(module, datamodule=data)
    assert (fed[0] == 0).any() and not (module.validated == 0).any()


def test_options_without_effect_and_wrong_ones_are_told() -> None:
    with pytest.warns(UserWarning, match="remode='const' has no effect"):
        CIFARDataModule(root="unused", remode="const")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CIFARDataModule(root="unused", remode="const", reprob=0.1)
    for options, message in (
        (dict(num_classes=20), "CIFAR has 10 or 100"),
        (dict(class_subset=[1, 1]), "at least two different labels"),
        (dict(padding=40), "padding 40 must lie in"),
        (dict(remode="noise", reprob=0.5), "choose pixel, rand or const"),
        (dict(num_workers=-1), "num_workers is -1"),
        (dict(mean=(0.5,)), "must have in_chans = 3 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            CIFARDataModule(root="unused", **options)

"""The global filter against its definition, in each of the forms that it takes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hornet_lit.network import spectrum

# Even and odd sides of either order; the last is beyond the products' longest side, where the FFT takes over.
SIZES = [(14, 14), (7, 7), (9, 12), (12, 9), (1, 5), (32, 30)]


def drawn(height: int, width: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """A map as the network has it, half of the channels of a channels-last one, and a weight."""
    torch.manual_seed(0)
    x_BCHW = torch.randn(2, 8, height, width, **kwargs).contiguous(memory_format=torch.channels_last)[:, 4:]
    return x_BCHW, torch.randn(4, height, width // 2 + 1, 2, **kwargs)


def defined(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> torch.Tensor:
    """By numpy, in float64."""
    weight = weight_CHF2.double().numpy()
    spectrum_BCHF = np.fft.rfft2(x_BCHW.double().numpy(), norm="ortho") * (weight[..., 0] + 1j * weight[..., 1])
    return torch.from_numpy(np.fft.irfft2(spectrum_BCHF, s=x_BCHW.shape[-2:], norm="ortho"))


def differentiable(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch, in the type it is given."""
    spectrum_BCHF = torch.fft.rfft2(x_BCHW, norm="ortho") * torch.view_as_complex(weight_CHF2)
    return torch.fft.irfft2(spectrum_BCHF, s=x_BCHW.shape[-2:], norm="ortho")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=["_Filter", "by_products", "by_fft"])
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One form for all sizes, the others gone."""
    sides = dict.fromkeys((torch.float32, torch.bfloat16), 100)
    kernel, products = sides if request.param == "_Filter" else {}, sides if request.param == "by_products" else {}
    if kernel and not spectrum._built():
        pytest.skip("no compiler, or neither AVX2 nor AVX-512")
    monkeypatch.setattr(spectrum, "LONGEST_KERNEL_SIDE", kernel)
    monkeypatch.setattr(spectrum, "LONGEST_SIDE", {"cpu": products})
    for other in {"_Filter", "by_products", "by_fft"} - {request.param}:
        monkeypatch.delattr(spectrum, other)
    return request.param


@pytest.mark.parametrize("height,width", SIZES)
def test_multiplies_the_spectrum(height: int, width: int) -> None:
    x_BCHW, weight_CHF2 = drawn(height, width)
    found = spectrum.filter_spectrum(x_BCHW, weight_CHF2)
    assert found.shape == x_BCHW.shape and found.dtype == torch.float32
    assert error(found, defined(x_BCHW, weight_CHF2)) < 1e-6


@pytest.mark.parametrize("height,width", SIZES)
@pytest.mark.parametrize("channels,layout", [(4, torch.channels_last), (20, torch.contiguous_format)])
def test_each_form_has_the_values_and_gradients_of_the_definition(
    height: int, width: int, channels: int, layout: torch.memory_format, only: str
) -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(3, 2 * channels, height, width).contiguous(memory_format=layout)[:, channels:]
    weight_CHF2 = torch.randn(channels, height, width // 2 + 1, 2)
    dy_BCHW = torch.randn(3, channels, height, width)
    found = []
    for x, weight in ((x_BCHW, weight_CHF2), (x_BCHW.double(), weight_CHF2.double())):
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = (spectrum.filter_spectrum if x.dtype == torch.float32 else differentiable)(*leaves)
        y.backward(dy_BCHW.to(x.dtype))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*found, strict=True):
        assert error(ours, exact) < 1e-6


def test_the_kernel_is_chosen_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    if not spectrum._built():
        pytest.skip("no compiler, or neither AVX2 nor AVX-512")
    for other in ("by_products", "by_fft"):
        monkeypatch.delattr(spectrum, other)
    x_BCHW, weight_CHF2 = (t.requires_grad_() for t in drawn(14, 14))
    compiled = torch.compile(spectrum.filter_spectrum, backend="aot_eager", fullgraph=True)
    grads = []
    for f in (spectrum.filter_spectrum, compiled):
        grads.append(torch.autograd.grad(f(x_BCHW, weight_CHF2).square().sum(), (x_BCHW, weight_CHF2)))
    torch.testing.assert_close(*grads)
    torch.library.opcheck(torch.ops.hornet_lit.global_filter, (x_BCHW.detach(), weight_CHF2.detach()))
    dy_BCHW = torch.randn(x_BCHW.shape)
    torch.library.opcheck(torch.ops.hornet_lit.global_filter_backward, (dy_BCHW, x_BCHW.detach(), weight_CHF2.detach()))


@pytest.mark.parametrize("height,width", [(1, 1), (6, 1), (1, 6)])
def test_the_stride_of_a_side_of_one_is_not_read(height: int, width: int) -> None:
    """It may be anything: 1 in (B, C, 1, 1) as PyTorch lays it out, or as long as the map."""
    torch.manual_seed(0)
    weight_CHF2 = torch.randn(4, height, width // 2 + 1, 2)
    standard_BCHW = torch.randn(2, 4, height, width)
    turned_BCHW = torch.randn(2, 4, width, height).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    for x_BCHW in (standard_BCHW, turned_BCHW):
        for dy_BCHW in (standard_BCHW, turned_BCHW):
            grads = []
            for x, weight in ((x_BCHW, weight_CHF2), (x_BCHW.double(), weight_CHF2.double())):
                leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
                y = (spectrum.filter_spectrum if x.dtype == torch.float32 else differentiable)(*leaves)
                grads.append((y.detach(), *torch.autograd.grad(y, leaves, dy_BCHW.to(x.dtype))))
            assert max(error(ours, exact) for ours, exact in zip(*grads, strict=True)) < 1e-6


def test_a_weight_that_does_not_fit_is_an_error_and_not_read() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        spectrum.filter_spectrum(torch.randn(2, 40, 6, 6), torch.randn(20, 6, 4, 2))


def test_gradients_of_the_products_by_finite_differences() -> None:
    x_BCHW, weight_CHF2 = (t.requires_grad_() for t in drawn(5, 6, dtype=torch.double))
    assert torch.autograd.gradcheck(spectrum.filter_spectrum, (x_BCHW, weight_CHF2))


@pytest.mark.parametrize("height,width", SIZES)
def test_bfloat16_errs_by_its_rounding(height: int, width: int, only: str) -> None:
    x_BCHW, weight_CHF2 = drawn(height, width)
    expected = defined(x_BCHW, weight_CHF2)
    found = spectrum.filter_spectrum(x_BCHW.bfloat16(), weight_CHF2.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        automatic = spectrum.filter_spectrum(x_BCHW, weight_CHF2)
    assert found.dtype == torch.bfloat16 and error(found, expected) < 1.5e-2
    assert error(automatic, expected) < 1.5e-2


@pytest.mark.parametrize("channels", [16, 24])
def test_maps_larger_than_the_caches(channels: int) -> None:
    """They are written past them, if their pixels are whole lines of memory."""
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in (torch.randn(8, channels, 48, 46), torch.randn(channels, 48, 24, 2))]
    results = [f(*leaves) for f in (spectrum.filter_spectrum, spectrum.by_fft)]
    for ours, exact in zip(
        *([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)] for y in results), strict=True
    ):
        assert error(ours, exact) < 3e-6


@pytest.mark.parametrize("height,width", SIZES)
def test_bfloat16_gradients_err_by_its_rounding(height: int, width: int, only: str) -> None:
    leaves = [t.requires_grad_() for t in drawn(height, width)]
    dy_BCHW = drawn(height, width)[0] + 1
    exact = torch.autograd.grad(differentiable(*(t.double() for t in leaves)), leaves, dy_BCHW.double())
    found = torch.autograd.grad(spectrum.filter_spectrum(leaves[0].bfloat16(), leaves[1]), leaves, dy_BCHW.bfloat16())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32 and error(ours, theirs) < 1.5e-2


def test_matrices_made_without_gradients_serve_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "LONGEST_KERNEL_SIDE", {})
    monkeypatch.setattr(spectrum, "_products_of", {})
    x_BCHW, weight_CHF2 = drawn(6, 6)
    with torch.inference_mode():
        spectrum.filter_spectrum(x_BCHW, weight_CHF2)
    spectrum.filter_spectrum(x_BCHW.requires_grad_(), weight_CHF2).sum().backward()
    assert x_BCHW.grad is not None


@pytest.mark.parametrize("longest", [{}, spectrum.LONGEST_KERNEL_SIDE])
def test_threads_that_meet_a_size_at_once(monkeypatch: pytest.MonkeyPatch, longest: dict) -> None:
    """Both make its matrices: those that one of them uses must not be freed by the other."""
    x_BCHW, weight_CHF2 = drawn(12, 10)
    expected, made, dft, both = spectrum.filter_spectrum(x_BCHW, weight_CHF2), [], spectrum._dft, threading.Barrier(2)
    for name in ("_products_of", "_all_of"):
        monkeypatch.setattr(spectrum, name, {})
    monkeypatch.setattr(spectrum, "LONGEST_KERNEL_SIDE", longest)

    def at_once(*arguments) -> spectrum.Products:  # type: ignore[no-untyped-def]
        both.wait(timeout=60)
        made.append(dft(*arguments))
        return made[-1]

    monkeypatch.setattr(spectrum, "_dft", at_once)
    found = [None, None]

    def filtered(i: int) -> None:
        found[i] = spectrum.filter_spectrum(x_BCHW, weight_CHF2)

    threads = [threading.Thread(target=filtered, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and len(spectrum._products_of) == 1
    for y_BCHW in found:
        assert error(y_BCHW, expected) < 1e-5


def test_a_call_keeps_the_matrices_it_points_to(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BCHW, weight_CHF2 = drawn(12, 10)
    call = spectrum._filter_call(x_BCHW, weight_CHF2, torch.empty_like(x_BCHW))
    matrices = spectrum._matrices((12, 10))
    monkeypatch.setattr(spectrum, "_all_of", {})
    assert list(call.arguments.matrices) == [matrix.data_ptr() for matrix in matrices]
    assert any(kept is matrices for kept in call.tensors)


def test_tensors_without_data_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "LONGEST_KERNEL_SIDE", {})
    monkeypatch.setattr(spectrum, "_products_of", {})
    x_BCHW, weight_CHF2 = drawn(6, 6)
    with FakeTensorMode() as mode:
        fake = spectrum.filter_spectrum(mode.from_tensor(x_BCHW), mode.from_tensor(weight_CHF2))
    assert fake.shape == x_BCHW.shape and not spectrum._products_of
    assert type(spectrum.filter_spectrum(x_BCHW, weight_CHF2)) is torch.Tensor

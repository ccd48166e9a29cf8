"""Depth-wise convolution and our weight gradient against the library in float64, and the ways round them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hornet_lit.network import depthwise, native
from hornet_lit.network.depthwise import KERNEL_SIZES, depthwise_conv2d, depthwise_weight_grad
from tests.network.conftest import assert_near


def reference(x: torch.Tensor, grad: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return depthwise._library_weight_grad(x.double(), grad.double(), k)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "shape,k", [((8, 96, 14, 14), 7), ((3, 20, 9, 5), 7), ((1, 17, 40, 3), 5), ((2, 1, 1, 1), 3), ((5, 33, 18, 35), 11)]
)
def test_weight_grad_matches_float64(shape, k, dtype, tolerance, layout) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    for ours, exact in zip(depthwise_weight_grad(x, grad, k), reference(x, grad, k), strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_a_gradient_of_another_type_is_converted_and_not_misread() -> None:
    x, grad = torch.randn(2, 16, 8, 8).bfloat16(), torch.randn(2, 16, 8, 8)
    ours, _ = depthwise_weight_grad(x, grad, 7)
    exact, _ = reference(x, grad, 7)
    assert (ours.double() - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("k", KERNEL_SIZES)
@pytest.mark.parametrize("height", [1, 5, 18])
def test_convolution_of_any_width_matches_float64(height: int, k: int) -> None:
    torch.manual_seed(0)
    w, bias = torch.randn(11, 1, k, k) / k, torch.randn(11)
    for width in range(1, 19):
        x = torch.randn(2, 11, height, width)
        exact = F.conv2d(x.double(), w.double(), bias.double(), padding=k // 2, groups=11)
        assert_near(depthwise_conv2d(x, w, bias), exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_type_changes_nothing(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    expected = depthwise_weight_grad(x, grad, 7)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = depthwise_weight_grad(x, grad, 7)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_kernel_is_what_runs_here_where_there_is_a_compiler() -> None:
    if os.environ.get("HORNET_LIT_NATIVE") or os.environ.get("CXX"):
        pytest.skip("the environment says what is to run")
    assert (native.library("depthwise") is not None) == bool(
        shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    )


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "weight,bias",
    [
        (torch.randn(16, 1, 3, 3).double(), None),
        (torch.randn(16, 1, 3, 3), torch.randn(16).double()),
        (torch.randn(16, 1, 3, 3), torch.randn(4)),
        (torch.randn(8, 1, 3, 3), torch.randn(8)),
        (torch.randn(16, 2, 3, 3), torch.randn(16)),
    ],
)
def test_weights_that_do_not_fit_are_errors_and_not_read(
    weight: torch.Tensor, bias: torch.Tensor | None, trained: bool
) -> None:
    with pytest.raises(RuntimeError, match=r"type|shape|size"):
        depthwise_conv2d(torch.randn(2, 16, 6, 6), weight.clone().requires_grad_(trained), bias)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    w = torch.randn(3, 1, 3, 3, dtype=torch.double, requires_grad=True)
    b = torch.randn(3, dtype=torch.double, requires_grad=True) if bias else None
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_autograd_match_the_librarys(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(4, 16, 12, 10), torch.randn(4, 16, 12, 10)
    w, b = torch.randn(16, 1, 7, 7), torch.randn(16)
    results = []
    for f in (depthwise_conv2d, lambda x, w, b: F.conv2d(x, w, b, padding=3, groups=16)):
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, w, b)]
        f(*leaves).backward(grad.to(dtype))
        results.append([leaf.grad for leaf in leaves])
    for ours, library in zip(*results, strict=True):
        scale = library.abs().max().item()
        torch.testing.assert_close(ours, library, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 3e-2))


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    x, w = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x, w, None)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_compiled_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, library = [], native.library
    monkeypatch.setattr(native, "library", lambda name: asked.append(name) or library(name))
    x, w, b = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    depthwise_conv2d(x, w, b).square().sum().backward()
    eager = w.grad.clone()
    w.grad = None
    asked.clear()
    torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True)(x, w, b).square().sum().backward()
    torch.testing.assert_close(w.grad, eager)
    assert "depthwise" in asked, "compiled, it left our kernel out"


def test_without_a_compiler_the_librarys_gradient_is_used() -> None:
    """In a process that never had one, and there again with one that is switched off."""
    code = (
        "import os, sys, torch; from hornet_lit.network import native; from hornet_lit.network.depthwise import *;"
        "from hornet_lit.network.depthwise import _library_weight_grad as l\n"
        "def told():\n"
        "    x = torch.randn(2, 4, 8, 8); a, b = depthwise_weight_grad(x, x, 3), l(x, x, 3)\n"
        "    print(native.library('depthwise'), torch.equal(a[0], b[0]), torch.equal(a[1], b[1]))\n"
        "told()\n"
        "os.environ |= {'PATH': sys.argv[1], 'HORNET_LIT_NATIVE': '0'}; native.library.cache_clear()\n"
        "told()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "HORNET_LIT_NATIVE")} | {"PATH": "/nowhere"}
    command = [sys.executable, "-c", code, os.environ["PATH"]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines() == 2 * ["None True True"]


@pytest.mark.parametrize(
    "variable,value,reason",
    [
        ("CXX", "", "no such flag"),
        ("CXX", "launcher c++", "no such flag"),
        ("CXX", "/nowhere/c++ -O1", r"CXX names '/nowhere/c\+\+', which is not there"),
        ("CXX", "'c++", "No closing quotation"),
        ("CXXFLAGS", '-DX="a', "No closing quotation"),
        ("CXX", "latin", "decode byte"),
        ("XDG_CACHE_HOME", "/dev/null", "Not a directory"),
        ("HOME", None, "home directory"),
    ],
)
def test_a_failing_compiler_is_a_warning_and_not_an_error(tmp_path, monkeypatch, variable, value, reason) -> None:
    compiler = "echo 'no such flag' >&2\n[ \"$1\" = --version ]\n"
    for name, script in (("c++", compiler), ("launcher", 'exec "$@"\n'), ("latin", "printf '\\351'\n")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CXXFLAGS", "HORNET_LIT_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if value is not None:
        monkeypatch.setenv(variable, value)
    else:  # as a process has it whose user is not in the system's list
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for cached in (native.library, native._builds, native._warn):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"could not be built.*{reason}"):
            assert native.library("depthwise") is None
    finally:
        for cached in (native.library, native._builds, native._warn):
            cached.cache_clear()


@pytest.mark.parametrize("value", ["0", "off", "False", "no"])
def test_it_can_be_switched_off(monkeypatch, value) -> None:
    monkeypatch.setenv("HORNET_LIT_NATIVE", value)
    native.library.cache_clear()
    try:
        assert native.library("depthwise") is None
    finally:
        native.library.cache_clear()

"""Single operations in the forms that one may choose between, at tiny's shapes.

Shapes: B batch, C channels, D channels out, H height, W width, P = H·W pixels, K numbers of a real spectrum.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hornet_lit.bench import machine, timed
from hornet_lit.network import depthwise
from hornet_lit.network.depthwise import depthwise_conv2d, depthwise_weight_grad
from hornet_lit.network.spectrum import by_fft, by_products
from tests.device.report import Bar, Job, Report, read

DEPTHWISE = ((96, 56), (224, 28), (480, 14), (992, 7))  # C, side
DENSE = ((64, 56), (128, 28), (256, 14), (512, 7))
GLOBAL = ((240, 14), (496, 7))
BLOCKS = (2, 3, 18, 2)  # of tiny at the shapes of DEPTHWISE; the global filter is in the last two stages
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TURNS = 9
FORMS = {"library": frozenset(), "Triton": depthwise.TRITON_KERNELS}  # of `depthwise.TRITON`
TRITON_TABLE = "depth-wise 7×7 on a slice of a channels-last map: the library against the Triton kernels"
GLOBAL_TABLE = "product in the spectrum: FFT against real DFT matrices, channels-last"
GRADIENT = "depth-wise 7×7 weight gradient over its forward, most of four shapes"


def bars() -> list[Bar]:
    return [Bar(name=f"{GRADIENT}, {dtype}", at_most=4.0) for dtype in DTYPES]


def run(job: Job) -> Report:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(part="kernels", machine=machine(device))
    timer = Timer(device, turns=2 if job.small else TURNS, inner=1 if job.small else 5)
    batch = 1 if job.small else 256  # as in `speed`: at small ones the host's time for a call is what counts
    for table in (_global, _triton, depthwise_table, _dense):  # the first two decide what `speed` measures
        torch.manual_seed(0)
        try:
            table(report, timer, batch)
        except Exception as error:  # whatever a kernel or its compiler comes to must not cost the other tables
            report.notes.append(f"{table.__name__} failed: {type(error).__name__}: {str(error)[:300]}")
        report.save(job.output)
        if job.left() < 0:
            report.notes.append("no time left for the rest")
            break
    return report


class Timer:
    """Milliseconds of operations that take turns: medians of the turns, each the mean of some calls in a row."""

    def __init__(self, device: torch.device, *, turns: int, inner: int) -> None:
        self.device, self.turns, self.inner = device, turns, inner

    def __call__(self, operations: dict[str, Callable[[], Any]]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in operations}
        for operation in operations.values():
            operation()
        for _ in range(self.turns):
            for name, operation in operations.items():
                seconds = timed(self.device, lambda operation=operation: [operation() for _ in range(self.inner)])
                times[name].append(seconds / self.inner * 1e3)
        return {name: statistics.median(values) for name, values in times.items()}

    def random(self, *shape: int, dtype: torch.dtype, channels_last: bool = True, grad: bool = False) -> Tensor:
        x = torch.randn(*shape, device=self.device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
        return x.requires_grad_(grad)


def _gradient(output: Tensor, wanted: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)


def depthwise_table(report: Report, timer: Timer, batch: int) -> None:
    """In all layouts and types; judges the weight gradient."""
    rows, ratios = [], {}
    for name, dtype in DTYPES.items():
        for c, side in DEPTHWISE:
            row: dict[str, Any] = {"shape": f"{batch}×{c}×{side}²", "type": name}
            for layout, last in (("channels-last", True), ("contiguous", False)):
                x_BCHW = timer.random(batch, c, side, side, dtype=dtype, channels_last=last)
                grad_BCHW = timer.random(batch, c, side, side, dtype=dtype, channels_last=last)
                weight, bias = timer.random(c, 1, 7, 7, dtype=dtype, grad=True), timer.random(c, dtype=dtype, grad=True)
                seen = x_BCHW.detach().requires_grad_()
                by_weight, by_input = depthwise_conv2d(x_BCHW, weight, bias), depthwise_conv2d(seen, weight, None)
                found = timer(
                    {
                        "forward": lambda x=x_BCHW, w=weight, b=bias: depthwise_conv2d(x, w.detach(), b.detach()),
                        "weight gradient": _gradient(by_weight, (weight, bias), grad_BCHW),
                        "input gradient": _gradient(by_input, (seen,), grad_BCHW),
                    }
                )
                row |= {f"{what} ms, {layout}": ms for what, ms in found.items()}
                row[f"ratio, {layout}"] = found["weight gradient"] / found["forward"]
            ratios.setdefault(name, []).append(row["ratio, channels-last"])
            rows.append(row)
    report.tables["depth-wise 7×7 as the package runs it"] = rows
    for name, values in ratios.items():
        report.found[f"{GRADIENT}, {name}"] = max(values)


def _triton(report: Report, timer: Timer, batch: int) -> None:
    """On such a slice as gnConv hands over, in bf16. Without CUDA the columns of both are the library's."""
    rows = report.tables.setdefault(TRITON_TABLE, [])
    for blocks, (c, side) in zip(BLOCKS, DEPTHWISE, strict=True):
        x_BCHW = timer.random(batch, c + 32, side, side, dtype=torch.bfloat16)[:, 32:]
        grad_BCHW = timer.random(batch, c, side, side, dtype=torch.bfloat16)
        weight, bias = timer.random(c, 1, 7, 7, dtype=torch.bfloat16), timer.random(c, dtype=torch.bfloat16)
        operations: dict[str, Callable[[], Any]] = {}
        results = []
        for form, parts in FORMS.items():
            forward = _with_triton(parts, lambda x=x_BCHW, w=weight, b=bias: depthwise_conv2d(x, w, b))
            gradient = _with_triton(parts, lambda x=x_BCHW, grad=grad_BCHW: depthwise_weight_grad(x, grad, 7))
            operations |= {f"forward, {form}": forward, f"weight_grad, {form}": gradient}
            results.append((forward(), *gradient()))
        found = timer(operations)
        errors = torch.stack([(b - a).float().norm() / a.float().norm() for a, b in zip(*results, strict=True)])
        row = {"shape": f"{batch}×{c}×{side}²", "blocks": blocks} | {f"{what} ms": ms for what, ms in found.items()}
        rows.append(row | {"relative error": errors.max().item()})


def faster_kernels(output: Path) -> frozenset[str]:
    """What of ours beat the library in this part's report, over all blocks of tiny and with the same values: of
    `depthwise.TRITON`, and "dft" where the products of the DFT did. Nothing where there is no whole report."""
    tables = read("kernels", output).tables
    rows, found = tables.get(TRITON_TABLE, []), set()

    def same(rows: list[dict[str, Any]]) -> bool:
        return all(row["relative error"] < 2e-2 for row in rows)  # of nan too

    if len(rows) == len(DEPTHWISE) and same(rows):
        total = {name: sum(row["blocks"] * row[name] for row in rows) for name in rows[0] if name.endswith(" ms")}
        found = {part for part in FORMS["Triton"] if total[f"{part}, Triton ms"] < total[f"{part}, library ms"]}
    fft, products = (
        [row for row in tables.get(GLOBAL_TABLE, []) if row["form"] == form] for form in ("FFT", "separable bf16")
    )
    both = len(fft) == len(products) == len(GLOBAL)
    if both and same(products):
        times = [sum(r["blocks"] * (r["forward ms"] + r["gradients ms"]) for r in form) for form in (fft, products)]
        found |= {"dft"} if times[1] < times[0] else set()
    return frozenset(found)


def _with_triton(parts: frozenset[str], operation: Callable[[], Any]) -> Callable[[], Any]:
    return patch.object(depthwise, "TRITON", parts)(operation)


def _dense(report: Report, timer: Timer, batch: int) -> None:
    """A linear layer over the last dimension of (B, H, W, C), against a 1×1 convolution, channels-last, bf16."""
    rows = []
    for c, side in DENSE:
        for what, wide, narrow in (("expand", c, 4 * c), ("contract", 4 * c, c), ("project", c, 2 * c)):
            x_BCHW = timer.random(batch, wide, side, side, dtype=torch.bfloat16, grad=True)
            grad_BDHW = timer.random(batch, narrow, side, side, dtype=torch.bfloat16)
            weight_DC = timer.random(narrow, wide, dtype=torch.bfloat16, grad=True)
            bias_D = timer.random(narrow, dtype=torch.bfloat16, grad=True)

            def linear(x: Tensor = x_BCHW, w: Tensor = weight_DC, b: Tensor = bias_D) -> Tensor:
                return F.linear(x.permute(0, 2, 3, 1), w, b).permute(0, 3, 1, 2)

            def convolution(x: Tensor = x_BCHW, w: Tensor = weight_DC, b: Tensor = bias_D) -> Tensor:
                return F.conv2d(x, w[:, :, None, None], b)

            wanted = (x_BCHW, weight_DC, bias_D)
            found = timer(
                {
                    "linear, forward": _no_grad(linear),
                    "convolution, forward": _no_grad(convolution),
                    "linear, gradients": _gradient(linear(), wanted, grad_BDHW),
                    "convolution, gradients": _gradient(convolution(), wanted, grad_BDHW),
                }
            )
            row = {"layer": f"{what} {wide}→{narrow}", "pixels": f"{batch}×{side}²"}
            rows.append(row | {f"{name} ms": ms for name, ms in found.items()})
    report.tables["linear against 1×1 convolution, bf16, channels-last"] = rows


def _global(report: Report, timer: Timer, batch: int) -> None:
    rows = []
    for blocks, (c, side) in zip(BLOCKS[2:], GLOBAL, strict=True):
        x_BCHW = timer.random(batch, c, side, side, dtype=torch.float32, grad=True)
        weight_CHF2 = (
            timer.random(c, side, side // 2 + 1, 2, dtype=torch.float32, channels_last=False) * 0.02
        ).detach()
        weight_CHF2.requires_grad_()
        there_PK, back_KP = _dft(side, timer.device)
        forms: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]
        forms = {"FFT": (x_BCHW, lambda x, w=weight_CHF2: by_fft(x, w))}
        for name, dtype in DTYPES.items():
            matrices = there_PK.to(dtype), back_KP.to(dtype)
            x = x_BCHW.detach().to(dtype).requires_grad_()
            forms[f"separable {name}"] = (x, lambda x, w=weight_CHF2: by_products(x, w))
            forms[f"dense {name}"] = (x, lambda x, w=weight_CHF2, m=matrices: _by_matrices(x, w, *m))
        expected = by_fft(x_BCHW, weight_CHF2).detach()
        grad_BCHW = torch.randn_like(expected)
        for name, (x, form) in forms.items():
            output = form(x)
            found = timer(
                {
                    "forward": _no_grad(lambda x=x, form=form: form(x)),
                    "gradients": _gradient(output, (x, weight_CHF2), grad_BCHW.to(output.dtype)),
                }
            )
            error = ((output.detach().float() - expected).norm() / expected.norm()).item()
            times = {f"{what} ms": ms for what, ms in found.items()}
            row = {"shape": f"{batch}×{c}×{side}²", "blocks": blocks, "form": name}
            rows.append(row | times | {"relative error": error})
    report.tables[GLOBAL_TABLE] = rows


def _no_grad(operation: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(operation)


def _dft(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """rfft2 as a matrix (P, K), real and imaginary parts side by side, and irfft2 as one (K, P)."""
    frequencies = side // 2 + 1
    eye_PHW = torch.eye(side * side).view(-1, side, side)
    there_PK = torch.view_as_real(torch.fft.rfft2(eye_PHW, norm="ortho")).flatten(1)
    eye_KHF2 = torch.eye(2 * side * frequencies).view(-1, side, frequencies, 2)
    back_KP = torch.fft.irfft2(torch.view_as_complex(eye_KHF2), s=(side, side), norm="ortho").flatten(1)
    return there_PK.to(device), back_KP.to(device)


def _by_matrices(x_BCHW: Tensor, weight_CHF2: Tensor, there_PK: Tensor, back_KP: Tensor) -> Tensor:
    b, c, h, w = x_BCHW.shape
    x_BPC = x_BCHW.permute(0, 2, 3, 1).reshape(b, h * w, c)
    spectrum_BF2C = (there_PK.T @ x_BPC).view(b, -1, 2, c)
    real_FC, imaginary_FC = weight_CHF2.to(x_BPC.dtype).flatten(1, 2).permute(2, 1, 0)
    real, imaginary = spectrum_BF2C.unbind(2)
    product = (real * real_FC - imaginary * imaginary_FC, real * imaginary_FC + imaginary * real_FC)
    y_BPC = back_KP.T @ torch.stack(product, dim=2).flatten(1, 2)
    return y_BPC.view(b, h, w, c).permute(0, 3, 1, 2)

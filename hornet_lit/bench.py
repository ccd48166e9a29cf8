"""How fast a network is and what memory it takes, on this machine: several interleaved, beside the machine's own limit.

Timings on shared machines drift by tens of per cent within minutes. So all that is compared takes turns in one run,
the median of the turns is reported with their range, and the rate of a plain matrix product, in the same turns, says
what the machine could have done.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hornet_lit.network.build import build_network

T = TypeVar("T")
STEPS = ("infer", "train")
CLASSES = 1000
PRODUCT_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured.

    Attributes:
        network: name registered with timm.
        step: "infer" (forward) or "train" (forward, cross-entropy, backward, AdamW).
        size: side of the images. batch: images a step.
        precision: "32"; "bf16-mixed", autocast; "bf16", weights and images too.
        channels_last: layout of weights and images.
        compile: "none", or a mode of torch.compile; inference is frozen then (weights become constants).
    """

    network: str
    step: str
    size: int
    batch: int
    precision: str
    channels_last: bool
    compile: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one setting; the times in seconds a step, in the order in which they were taken.

    Attributes:
        times: of each turn.
        gflops: 10⁹ floating-point operations an image, of a whole step; a multiplication and an addition are two.
        product_rate: 10⁹ operations a second of the best square matrix product, the median of its turns.
        product_type: "fp32" or "bf16", which that product multiplies: see `BestProduct`.
        peak_bytes: memory in tensors at the most, weights, gradients and optimizer state included.
        saved_bytes: kept an image from the forward for the backward pass, weights left out; None for inference.
    """

    setting: Setting
    times: list[float]
    gflops: float
    product_rate: float
    product_type: str
    peak_bytes: int
    saved_bytes: float | None

    @property
    def images_per_second(self) -> float:
        return self.setting.batch / statistics.median(self.times)

    @property
    def share(self) -> float:
        """Of the matrix product's rate."""
        return self.gflops * self.images_per_second / self.product_rate

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"images_per_second": self.images_per_second, "share_of_product_rate": self.share}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        vectors = torch.backends.cpu.get_cpu_capability()
        name = f"{_processor()} with {vectors}" + (" and bf16" if torch.cpu._is_avx512_bf16_supported() else "")
    about = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return about | {"python": platform.python_version()}


def _processor() -> str:
    with suppress(OSError, StopIteration):  # Linux; elsewhere the platform may know
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def measure(
    settings: Sequence[Setting], *, device: torch.device, repeats: int, turn_done: Callable[[], None] = lambda: None
) -> list[Result]:
    """Measures settings that share size, batch, step and precision, in turns.

    Args:
        settings: to take turns.
        device: CPU or CUDA.
        repeats: turns.
        turn_done: called after each step and product of a turn, `repeats` × (settings + 1) times.

    Raises:
        ValueError: for a network that is unknown or does not take this size.
    """
    runs = [Run(setting, device) for setting in settings]
    for run in runs:
        run.warm_up()
    return take_turns(runs, repeats=repeats, turn_done=turn_done)


def take_turns(runs: Sequence[Run], *, repeats: int, turn_done: Callable[[], None] = lambda: None) -> list[Result]:
    """Measures warm runs of one device and precision in turns, beside the machine's best matrix product for that."""
    product = BestProduct(runs[0].device, runs[0].setting.precision)
    rates = []
    for _ in range(repeats):
        for run in runs:
            run.take_turn()
            turn_done()
        rates.append(product.rate())
        turn_done()
    rate = statistics.median(rates)
    return [run.result(product_rate=rate, product_type=product.type) for run in runs]


class Run:
    """One setting: network, images and optimizer on the device.

    Args:
        setting: what is measured.
        device: CPU or CUDA.
        network: in place of the one that timm builds by the setting's name.

    Raises:
        ValueError: for a network that is unknown or does not take this size.
    """

    def __init__(self, setting: Setting, device: torch.device, network: nn.Module | None = None) -> None:
        self.setting, self.device = setting, device
        torch.manual_seed(0)
        network = _build(setting.network, setting.size) if network is None else network
        # Under no_grad the counter of operations fails on views of weights that would have gradients.
        network.requires_grad_(setting.step == "train")
        dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.network = network.to(device, dtype, memory_format=layout).train(setting.step == "train")
        self.x_BCHW = torch.randn(setting.batch, 3, setting.size, setting.size, device=device, dtype=dtype)
        self.x_BCHW = self.x_BCHW.contiguous(memory_format=layout)
        self.y_B = torch.randint(0, CLASSES, (setting.batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-6, fused=True)
        self.times: list[float] = []

    def warm_up(self) -> None:
        """Counts operations and bytes, and compiles."""
        self.gflops = _gflops(self)
        self.saved_bytes = _saved_bytes(self) if self.setting.step == "train" else None
        self.compile()
        for _ in range(2):
            self.step()
        self.peak_bytes = _peak_bytes(self)

    def compile(self) -> None:
        """Sets the network up to be compiled by its next step, where the setting asks for that."""
        if self.setting.compile != "none":
            self.network.compile(mode=None if self.setting.compile == "default" else self.setting.compile)

    def step(self) -> None:
        if self.setting.step == "infer":
            # Not inference_mode, under which torch.compile does not freeze the weights.
            with torch.no_grad(), self._frozen(), self._autocast():
                self.network(self.x_BCHW)
            return
        with self._autocast():
            logits_BK = self.network(self.x_BCHW)
        F.cross_entropy(logits_BK.float(), self.y_B).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_turn(self) -> None:
        self.times.append(timed(self.device, self.step))

    def result(self, *, product_rate: float, product_type: str) -> Result:
        return Result(
            setting=self.setting,
            times=self.times,
            gflops=self.gflops,
            product_rate=product_rate,
            product_type=product_type,
            peak_bytes=self.peak_bytes,
            saved_bytes=self.saved_bytes,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        mixed = self.setting.precision == "bf16-mixed"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if mixed else nullcontext()

    def _frozen(self) -> AbstractContextManager[Any]:
        if self.setting.compile == "none":
            return nullcontext()
        from torch._inductor import config

        return config.patch(freezing=True)


def _build(name: str, size: int) -> nn.Module:
    try:
        return build_network(name, num_classes=CLASSES, img_size=size)
    except ValueError as error:
        if "'img_size'" not in str(error):
            raise
        return build_network(name, num_classes=CLASSES)  # one that takes any size, and no option


def timed(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds that ``run`` takes, what it starts on the device included."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _gflops(run: Run) -> float:
    """10⁹ operations an image of a step, the optimizer's left out.

    Counted without computing, on the meta device: so a form that is chosen for one device's sake, as the DFT by matrix
    products, does not pass for work that the network asks for.
    """
    network, x_BCHW = copy.deepcopy(run.network).to("meta"), run.x_BCHW.to("meta")
    with FlopCounterMode(display=False, custom_mapping=_flop_formulas()) as counter:
        logits_BK = network(x_BCHW)
        if run.setting.step == "train":
            logits_BK.sum().backward()
    return counter.get_total_flops() / run.setting.batch / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BestProduct:
    """The fastest of some square matrix products, for a precision.

    Each is tried as a matrix product and as a 1×1 convolution of a channels-last map: on CPUs the two come from
    different libraries, MKL and oneDNN, and which is faster depends on the processor. On CUDA torch lets convolutions
    in float32 use TF32: this one as well as those of a network. For bfloat16 float32 is tried too: it is faster on
    CPUs that do not multiply bfloat16.

    Attributes:
        type: "fp32" or "bf16".
        rate: a function that times it once and gives its rate, in 10⁹ operations a second.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._device, sizes = device, PRODUCT_SIZES[device.type]
        types = ("fp32",) if precision == "32" else ("bf16", "fp32")
        # By the smallest: the large ones take seconds where bfloat16 is emulated.
        self.type = max(types, key=lambda name: max(self._rates(name, sizes[:1]).values()))
        found = self._rates(self.type, sizes)
        self.rate = max(found, key=found.__getitem__)

    def _rates(self, name: str, sizes: Sequence[int]) -> dict[Callable[[], float], float]:
        candidates = [partial(self._rate, n, product) for n in sizes for product in self._products(name, n)]
        for candidate in candidates:
            candidate()
        return {candidate: statistics.median(candidate() for _ in range(3)) for candidate in candidates}

    def _rate(self, n: int, product: Callable[[], Tensor]) -> float:
        return 2 * n**3 / timed(self._device, product) / 1e9

    def _products(self, name: str, n: int) -> Iterator[Callable[[], Tensor]]:
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        a_NN, b_NN = (torch.randn(n, n, device=self._device, dtype=dtype) for _ in range(2))
        x_BCHW = a_NN[None, :, :, None].contiguous(memory_format=torch.channels_last)
        yield lambda: a_NN @ b_NN
        yield lambda: F.conv2d(x_BCHW, b_NN[:, :, None, None])


def held_bytes(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """``forward()`` and the bytes of CPU memory that are held because its result is: what autograd keeps.

    Counted by what is allocated and not freed: autograd does not know what recomputation holds.
    """
    result, allocations = _allocations(forward)
    return result, sum(allocations) - result.untyped_storage().nbytes()


def _saved_bytes(run: Run) -> float:
    """Bytes an image of what is kept from the forward for the backward pass."""

    def forward() -> Tensor:
        with run._autocast():
            return run.network(run.x_BCHW)

    if run.device.type != "cuda":
        return held_bytes(forward)[1] / run.setting.batch
    before = torch.cuda.memory_allocated(run.device)
    logits_BK = forward()
    return (torch.cuda.memory_allocated(run.device) - before - logits_BK.nbytes) / run.setting.batch


def resident_bytes(run: Run) -> int:
    """Bytes of weights, buffers and optimizer state, which do not grow with the images."""
    states = [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(t.nbytes for t in (*run.network.parameters(), *run.network.buffers(), *states))


def _peak_bytes(run: Run) -> int:
    held = resident_bytes(run) + run.x_BCHW.nbytes
    if run.device.type == "cuda":
        of_others = torch.cuda.memory_allocated(run.device) - held
        torch.cuda.reset_peak_memory_stats(run.device)
        run.step()
        return torch.cuda.max_memory_allocated(run.device) - of_others
    _, allocations = _allocations(run.step)
    return held + max(itertools.accumulate(allocations))


def _allocations(call: Callable[[], T]) -> tuple[T, list[int]]:
    """What ``call`` gives, and the bytes of CPU memory that it allocated (freed: negative), in order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """Of the operations that torch's counter does not know, and of one that it overrates: real FFTs, our depth-wise
    weight gradient, and the gradients of grouped convolutions, which it counts as if there were one group."""

    def fft(x_shape: Sequence[int], dim: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        # Half of a complex FFT of the real side's size: 5 N log2 N operations, Cooley and Tukey's count.
        places = [d % len(x_shape) for d in dim]
        points = math.prod(max(x_shape[d], out_shape[d]) for d in places)
        planes = math.prod(length for d, length in enumerate(x_shape) if d not in places)
        return int(planes * 2.5 * points * math.log2(points))

    def weight_gradient(x_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
        b, c, h, w = x_shape
        return 2 * b * c * h * w * args[1] ** 2

    def convolution_gradients(
        grad_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *args: Any, **kwargs: Any
    ) -> int:
        wanted = kwargs.get("output_mask", args[-1])
        each = 2 * grad_shape[0] * math.prod(grad_shape[2:]) * math.prod(w_shape)
        return each * sum(wanted[:2])

    aten = torch.ops.aten
    return {
        aten.convolution_backward: convolution_gradients,
        aten._fft_r2c: fft,
        aten._fft_c2r: fft,
        torch.ops.hornet_lit.depthwise_weight_grad: weight_gradient,
    }

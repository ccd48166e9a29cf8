"""The Triton kernels without a GPU: their values in the interpreter, and what the compiler makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux only")
VERSIONS = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np)]


@pytest.mark.skipif(VERSIONS[0] < (3, 7) and VERSIONS[1] >= (2, 4), reason="Triton 3.6's interpreter needs numpy < 2.4")
def test_values_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.network.interpreted_triton"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0 and result.stdout == "the same\n", result.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["convolve_kernel", "weight_sums_kernel"])
def test_loops_without_shared_memory_and_barriers(kernel: str, dtype: str, capability: int) -> None:
    """As the module says of its tiles; 16 bytes at once, since each pixel's channels are whole multiples of that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hornet_lit.network import triton_depthwise

    sizes = {"convolve_kernel": triton_depthwise.PIXELS, "weight_sums_kernel": triton_depthwise.PIXELS_IN_SUMS}
    constants = {"HAS_BIAS": True, "K": 7, "P": sizes[kernel], "C": triton_depthwise.CHANNELS}
    function = getattr(triton_depthwise, kernel)
    names = [p.name for p in function.params]
    sums = ("sums_ptr", "bias_ptr") if kernel == "weight_sums_kernel" else ()

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return f"*{'fp32' if name in sums else dtype}" if name.endswith("_ptr") else "i32"

    aligned = [i for i, name in enumerate(names) if name.endswith(("_ptr", "_step")) or name == "channels"]
    source = ASTSource(
        fn=function,
        signature={name: kind(name) for name in names},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    loop = longest_loop(ptx.splitlines())
    assert loop.count("fma.rn.f32") >= 7 * 8, "not the loop over the pixels"
    assert "ld.global.v4" in loop and not re.search(r"(ld|st)\.shared|bar\.sync", loop)


def longest_loop(lines: list[str]) -> str:
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if line.startswith("$L")}
    jumps = ((i, re.search(r"bra(?:\.uni)?\s+(\$\w+)", line)) for i, line in enumerate(lines))
    loops = [lines[labels[jump[1]] : i] for i, jump in jumps if jump and labels.get(jump[1], i) < i]
    return "\n".join(max(loops, key=len))

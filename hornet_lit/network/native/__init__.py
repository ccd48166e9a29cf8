"""C++ kernels compiled on first use where there is a compiler, and only then; everything works without them.

`$HORNET_LIT_NATIVE=0` switches them off; `$CXX` names the compiler, and `$CXXFLAGS` are added to our flags. Libraries
are kept in `$XDG_CACHE_HOME/hornet-lit` (`~/.cache`), named by source, compiler, flags and processor, so that one home
folder can serve machines of different kinds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of ``name``.cpp, or None where they are switched off or cannot be built."""
    if os.environ.get("HORNET_LIT_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_builds(compiler)[name].result()))
    except (OSError, subprocess.SubprocessError) as error:
        _warn(getattr(error, "stderr", "") or str(error))
        return None


@torch.compiler.assume_constant_result
def offers(name: str, symbol: str) -> bool:
    """Whether the library ``name`` could be built and has that kernel: not all processors have them all."""
    return hasattr(library(name), symbol)


@torch.compiler.assume_constant_result
def lanes(name: str) -> int:
    """Pixels or channels of one vector of the library ``name``, which must have been built."""
    return library(name).lanes()


@functools.cache
def _builds(compiler: str) -> dict[str, Future[Path]]:
    """All libraries, built at once: who needs one needs the others next."""
    with ThreadPoolExecutor() as pool:
        return {source.stem: pool.submit(_built, compiler, source) for source in Path(__file__).parent.glob("*.cpp")}


@functools.cache  # one reason is enough, if they have the same
def _warn(detail: str) -> None:
    detail = detail.strip()[:300]
    warnings.warn(f"hornet-lit's CPU kernels could not be built, PyTorch's slower ones serve: {detail}", stacklevel=3)


def _built(compiler: str, source: Path) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [source.read_text(), *(header.read_text() for header in sorted(source.parent.glob("*.h")))]
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    identity = "\n".join([*texts, version, *flags, platform.machine(), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hornet-lit"
    target = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Built beside its name and moved into place: several processes may start at once.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *flags, str(source), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            os.replace(built, target)
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

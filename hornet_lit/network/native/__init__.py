"""C++ kernels compiled on first use where there is a compiler, and only then; everything works without them.

`$HORNET_LIT_NATIVE=0` switches them off; `$CXX` is the compiler's command, and `$CXXFLAGS` are added to our flags, but
for those that would change values. Libraries are kept in `$XDG_CACHE_HOME/hornet-lit` (`~/.cache`), named by source,
compiler, flags and processor, so that one home folder can serve machines of different kinds.
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
# After the user's: with fast math GELU finds the wrong pieces, and hidden symbols are not found at all.
LAST_FLAGS = (
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
    "-fvisibility=default",
)
OFF = ("0", "off", "false", "no")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of ``name``.cpp, or None where they are switched off or cannot be built."""
    if os.environ.get("HORNET_LIT_NATIVE", "").lower() in OFF:
        return None
    try:
        compiler = _compiler()
        return None if compiler is None else ctypes.CDLL(str(_builds(compiler)[name].result()))
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:  # whatever the environment holds
        _warn(getattr(error, "stderr", "") or str(error))
        return None


def _compiler() -> tuple[str, ...] | None:
    named = tuple(shlex.split(os.environ.get("CXX", "")))
    if named and shutil.which(named[0]) is None:
        raise ValueError(f"CXX names {named[0]!r}, which is not there")
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return named or ((found,) if found else None)


@torch.compiler.assume_constant_result
def offers(name: str, symbol: str) -> bool:
    """Whether the library ``name`` could be built and has that kernel: not all processors have them all."""
    return hasattr(library(name), symbol)


@torch.compiler.assume_constant_result
def lanes(name: str) -> int:
    """Pixels or channels of one vector of the library ``name``, which must have been built."""
    return library(name).lanes()


@functools.cache
def _builds(compiler: tuple[str, ...]) -> dict[str, Future[Path]]:
    """All libraries, built at once: who needs one needs the others next."""
    with ThreadPoolExecutor() as pool:
        return {source.stem: pool.submit(_built, compiler, source) for source in Path(__file__).parent.glob("*.cpp")}


@functools.cache  # one reason is enough, if they have the same
def _warn(detail: str) -> None:
    detail = detail.strip()[:300]
    warnings.warn(f"hornet-lit's CPU kernels could not be built, PyTorch's slower ones serve: {detail}", stacklevel=3)


def _built(compiler: tuple[str, ...], source: Path) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [source.read_text(), *(header.read_text() for header in sorted(source.parent.glob("*.h")))]
    # -Ofast, whatever follows it, has denormals flushed in the whole process.
    own = ["-O3" if flag == "-Ofast" else flag for flag in shlex.split(os.environ.get("CXXFLAGS", ""))]
    flags = [*FLAGS, *own, *LAST_FLAGS]
    identity = "\n".join([*texts, version, *compiler, *flags, platform.machine(), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hornet-lit"
    target = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Built beside its name and moved into place: several processes may start at once.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            command = [*compiler, *flags, str(source), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            with built.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut leaves a part of it under its name
            os.replace(built, target)
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))

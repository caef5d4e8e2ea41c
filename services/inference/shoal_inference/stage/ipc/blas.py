"""The BLAS that MLX's CPU build computes f32 matrices with.

The Linux wheel links the reference BLAS: an f32 matmul of 64 rows takes 137 ms, and 4.4 ms with OpenBLAS preloaded.
bf16, f16 and quantised kernels do not go through BLAS. On macOS MLX uses Accelerate: nothing to do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_NAMES = ("libopenblas.so.0", "libblas.so.3")


def _directories() -> tuple[Path, ...]:
    """Where Debian and its kin put the pthread build of OpenBLAS (package libopenblas0-pthread)."""
    triplets = ("x86_64-linux-gnu", "aarch64-linux-gnu")
    debian = [Path(f"/usr/lib/{triplet}{suffix}") for triplet in triplets for suffix in ("/openblas-pthread", "")]
    return (*debian, Path("/usr/lib64"), Path("/usr/lib"))


def find_openblas(directories: Sequence[Path]) -> Path | None:
    """The first OpenBLAS there; a libblas.so.3 counts only when it resolves into an OpenBLAS directory."""
    for name in _NAMES:
        for directory in directories:
            candidate = directory / name
            if candidate.is_file() and "openblas" in str(candidate.resolve()):
                return candidate
    return None


def child_environment(
    env: Mapping[str, str], *, platform: str = sys.platform, directories: Sequence[Path] | None = None
) -> dict[str, str]:
    """`env` for a stage: with OpenBLAS preloaded, one thread each, where there is one; unchanged elsewhere.

    One thread, because stages of one machine share its cores and MLX has threads of its own. A preload or a thread
    count that somebody chose stays.
    """
    out = dict(env)
    if platform != "linux":
        return out
    preloaded = out.get("LD_PRELOAD", "")
    library = find_openblas(_directories() if directories is None else directories)
    if library is None or "blas" in preloaded:
        return out
    out["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else str(library)
    out.setdefault("OPENBLAS_NUM_THREADS", "1")
    return out

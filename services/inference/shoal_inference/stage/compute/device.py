"""`python -m shoal_inference.stage.compute.device [--measure]`: what MLX computes with here, as one JSON line.

A process of its own: the service that asks does not load MLX. Measuring takes a fifth of a second and 64 MiB (256 MiB
on an accelerator), at low priority.
"""

from __future__ import annotations

import argparse
import os
import time

import msgspec

MEASURED_S = 0.2
_CPU_BYTES = 64 << 20
_ACCELERATOR_BYTES = 256 << 20
"""More than the caches between an accelerator and its memory hold."""
_WIDTH = 4096
_AT_ONCE = 8
"""Products in one evaluation on an accelerator, where starting one takes as long as reading some MiB."""
_LEAST_PASSES = 3


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What MLX said, and what was measured."""

    accelerator: str = ""
    """cpu, metal or cuda; "" while nobody has looked."""
    limit_bytes: int | None = None
    """What it recommends to use at most; None where it has no limit of its own."""
    bytes_per_s: float = 0.0
    """How fast it reads weights to multiply one vector by them; 0: not measured."""


def detect(measure: bool) -> Device:
    """Ask MLX; measure too when asked."""
    import mlx.core as mx  # noqa: PLC0415  # the service reads `Device` from here and must not load MLX

    accelerator = "cpu"
    if mx.default_device() == mx.Device(mx.gpu):
        accelerator = "metal" if mx.metal.is_available() else "cuda"
    limit = mx.device_info().get("max_recommended_working_set_size")
    device = Device(accelerator=accelerator, limit_bytes=int(limit) if limit else None)
    return msgspec.structs.replace(device, bytes_per_s=_measured(accelerator)) if measure else device


def _measured(accelerator: str) -> float:
    """Bytes a second of the fastest pass: a token reads each weight once, to multiply one vector by it."""
    import mlx.core as mx  # noqa: PLC0415  # as above

    alone = accelerator == "cpu"
    size_bytes, count = (_CPU_BYTES, 1) if alone else (_ACCELERATOR_BYTES, _AT_ONCE)
    weights = mx.ones((size_bytes // (2 * _WIDTH), _WIDTH), mx.bfloat16)
    vectors = [mx.full((1, _WIDTH), n + 1, mx.bfloat16) for n in range(count)]
    mx.eval(weights, vectors)
    best_s, passes, begun_s = float("inf"), 0, time.perf_counter()
    while passes < _LEAST_PASSES or time.perf_counter() - begun_s < MEASURED_S:
        at_s = time.perf_counter()
        mx.eval([v @ weights.T for v in vectors])
        best_s = min(best_s, time.perf_counter() - at_s)
        passes += 1
    return round(count * size_bytes / best_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="shoal_inference.stage.compute.device", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure how fast weights are read, too")
    os.nice(10)
    print(msgspec.json.encode(detect(parser.parse_args().measure)).decode())  # noqa: T201  # that is the answer

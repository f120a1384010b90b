"""The machine's own roofs: how fast it copies memory and multiplies 16-bit matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from jobs.bench.kernels.case import Case, Prepared, fill
from jobs.bench.kernels.timing import measure

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def cases(place: str, device: torch.device) -> Iterator[Case]:
    yield Case("machine", "copy", lambda: prepare_copy(COPY_BYTES[place], device))
    yield Case("machine", "bf16 matmul", lambda: prepare_matmul(MATMUL_SIZE[place], device))


def prepare_copy(num_bytes: int, device: torch.device) -> Prepared:
    """Half the bytes are read and half written."""
    source = fill((num_bytes // 8,), torch.float32, device, 0)
    target = torch.empty_like(source)

    def check() -> bool:
        target.copy_(source)
        return torch.equal(source, target)

    seconds = measure(lambda: target.copy_(source), device).p50
    return Prepared(lambda: target.copy_(source), check, num_bytes, facts={"copy_gb_per_s": num_bytes / seconds / 1e9})


def prepare_matmul(size: int, device: torch.device) -> Prepared:
    a, b = (fill((size, size), torch.bfloat16, device, seed) for seed in (1, 2))

    def check() -> bool:
        rows = a[:16].double() @ b.double()
        return bool(((a @ b)[:16].double() - rows).abs().max() <= 0.01 * rows.abs().max())

    seconds = measure(lambda: a @ b, device).p50
    num_flops = 2 * size**3
    facts = {"matmul_tflop_per_s": num_flops / seconds / 1e12}
    return Prepared(lambda: a @ b, check, num_flops=num_flops, facts=facts)

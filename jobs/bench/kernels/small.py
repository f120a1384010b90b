"""The small kernels, which move their operands once and compute little, beside the same in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.kv_cache
import kernels.quantized_kv
import kernels.rms_norm
import kernels.rope
import kernels.sampling
import kernels.silu_mul
from jobs.bench.kernels.case import Case, Prepared, fill
from kernels.attention_batch import new_kv_pages
from kernels.compare import compare

SIZES = {"cuda": (256, 4096, 14336, 128256), "cpu": (64, 1024, 2816, 32000), "interpreter": (3, 130, 70, 500)}
"""Rows, hidden size, feed-forward width, vocabulary."""
EPS = 1e-5


def cases(place: str, device: torch.device) -> Iterator[Case]:
    dtype = torch.float16 if place == "interpreter" else torch.bfloat16
    rows, hidden, width, vocab = SIZES[place]
    builders: dict[str, Callable[[], Prepared]] = {
        f"rms_norm {rows}x{hidden}": lambda: norm(place, fill((rows, hidden), dtype, device, 0)),
        f"add_rms_norm {rows}x{hidden}": lambda: add_norm(place, fill((rows, hidden), dtype, device, 0)),
        f"silu_mul {rows}x{width}": lambda: silu(place, fill((rows, 2 * width), dtype, device, 0)),
        f"rope {rows} tokens": lambda: rope(place, rows, dtype, device),
        f"write_kv {rows} tokens": lambda: write(place, rows, dtype, device, False),
        f"write_kv int8 {rows} tokens": lambda: write(place, rows, dtype, device, True),
        f"sample {rows}x{vocab}": lambda: sample(place, fill((rows, vocab), torch.float32, device, 0, 4.0)),
    }
    for name, build in builders.items():
        yield Case("small", name, build)


def _version(place: str, module: Any, name: str) -> Callable[..., Any]:
    chosen: Callable[..., Any] = getattr(module, f"{name}_cpu" if place == "cpu" else f"{name}_triton")
    return chosen


def norm(place: str, x: Tensor) -> Prepared:
    run = _version(place, kernels.rms_norm, "rms_norm")
    weight = fill((x.shape[1],), x.dtype, x.device, 1)
    reference = kernels.rms_norm.rms_norm_reference(x, weight, EPS)
    return Prepared(
        lambda: run(x, weight, EPS),
        lambda: compare(run(x, weight, EPS), F.rms_norm(x, weight.shape, weight, EPS), reference),
        num_bytes=2 * x.nbytes,
        baselines={"torch": lambda: F.rms_norm(x, weight.shape, weight, EPS)},
    )


def add_norm(place: str, x: Tensor) -> Prepared:
    run = _version(place, kernels.rms_norm, "add_rms_norm")
    weight, residual = fill((x.shape[1],), x.dtype, x.device, 1), fill(tuple(x.shape), x.dtype, x.device, 2)

    def in_torch(x: Tensor, residual: Tensor) -> Tensor:
        return F.rms_norm(residual.add_(x), weight.shape, weight, EPS)

    def check() -> Any:
        total = (x.double() + residual.double()).to(x.dtype)
        reference = kernels.rms_norm.rms_norm_reference(total, weight, EPS)
        return compare(run(x, residual.clone(), weight, EPS), in_torch(x, residual.clone()), reference)

    # Timed in place: the numbers grow, and how long it takes does not depend on them.
    return Prepared(
        lambda: run(x, residual, weight, EPS),
        check,
        num_bytes=4 * x.nbytes,
        baselines={"torch": lambda: in_torch(x, residual)},
    )


def silu(place: str, x: Tensor) -> Prepared:
    run = _version(place, kernels.silu_mul, "silu_mul")

    def in_torch() -> Tensor:
        gate, up = x.chunk(2, dim=1)
        return F.silu(gate) * up

    reference = kernels.silu_mul.silu_mul_reference(x)
    return Prepared(
        lambda: run(x),
        lambda: compare(run(x), in_torch(), reference),
        num_bytes=x.nbytes * 3 // 2,
        baselines={"torch": in_torch},
    )


def rope(place: str, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    run = _version(place, kernels.rope, "rope")
    q, k = fill((num_tokens, 32, 128), dtype, device, 0), fill((num_tokens, 8, 128), dtype, device, 1)
    positions = torch.arange(num_tokens, device=device)
    angles = positions[:, None].float() * 10000 ** (-torch.arange(64, device=device) / 64)
    cos, sin = angles.cos(), angles.sin()

    def in_torch(x: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = x.to(dtype).chunk(2, dim=-1)
        c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1)

    def check() -> Any:
        got_q, got_k = q.clone(), k.clone()
        run(got_q, got_k, positions, cos, sin)
        reports = [
            compare(got, in_torch(x, torch.float32).to(x.dtype), in_torch(x, torch.float64))
            for got, x in ((got_q, q), (got_k, k))
        ]
        return next((report for report in reports if not report.holds), reports[0])

    return Prepared(
        lambda: run(q, k, positions, cos, sin),
        check,
        num_bytes=2 * (q.nbytes + k.nbytes),
        baselines={"torch": lambda: (in_torch(q, q.dtype), in_torch(k, k.dtype))},
    )


def write(place: str, num_tokens: int, dtype: torch.dtype, device: torch.device, to_int8: bool) -> Prepared:
    module = kernels.quantized_kv if to_int8 else kernels.kv_cache
    run = _version(place, module, "write_quantized_kv" if to_int8 else "write_kv")
    k, v = (fill((num_tokens, 8, 128), dtype, device, seed) for seed in (0, 1))
    num_pages = -(-num_tokens // 16) + 4
    slots = torch.randperm(num_pages * 16, generator=torch.Generator().manual_seed(0))[:num_tokens].to(device)

    def new_pages(device: torch.device, in_pairs: bool) -> tuple[Any, Any]:
        if to_int8:
            return kernels.quantized_kv.new_quantized_pages(num_pages, 8, 16, 128, device, in_pairs)
        new_k, new_v = new_kv_pages(num_pages, 8, 16, 128, dtype, device)
        return new_k.contiguous(), new_v.contiguous()

    pages = new_pages(device, place != "cpu")

    def check() -> bool:
        """Written in torch on the CPU, bit for bit."""
        expected = new_pages(torch.device("cpu"), False)
        in_torch = kernels.quantized_kv.write_quantized_kv_cpu if to_int8 else kernels.kv_cache.write_kv_cpu
        in_torch(k.cpu(), v.cpu(), *expected, slots.cpu())
        run(k, v, *pages, slots)
        if not to_int8:
            return all(torch.equal(got.cpu(), want) for got, want in zip(pages, expected))
        return all(torch.equal(got.dequantize().cpu(), want.dequantize()) for got, want in zip(pages, expected))

    written = k.numel() * 2 + num_tokens * 8 * 4 * 2 if to_int8 else 2 * k.nbytes
    page, offset = slots // 16, slots % 16

    def index_put() -> None:
        pages[0][page, :, offset] = k
        pages[1][page, :, offset] = v

    baselines: dict[str, Callable[[], Any]] = {} if to_int8 else {"torch": index_put}
    return Prepared(lambda: run(k, v, *pages, slots), check, num_bytes=2 * k.nbytes + written, baselines=baselines)


def sample(place: str, logits: Tensor) -> Prepared:
    run = _version(place, kernels.sampling, "sample")
    rows = len(logits)

    def batch_on(device: torch.device) -> Any:
        floats, ints = torch.full((rows,), 0.8, device=device), torch.arange(rows, device=device)
        top_k, zeros = torch.full_like(ints, 50), torch.zeros_like(floats)
        return kernels.sampling.SamplingBatch(floats, top_k, floats + 0.1, zeros, ints, ints)

    batch = batch_on(logits.device)

    def check() -> bool:
        """The tokens that the CPU's version draws with the same keyed noise."""
        expected = kernels.sampling.sample_cpu(logits.cpu(), batch_on(torch.device("cpu")))
        return torch.equal(run(logits, batch).token_ids_B.cpu(), expected.token_ids_B)

    def in_torch() -> Tensor:
        top, ids = (logits / 0.8).topk(50)
        return ids.gather(1, top.softmax(-1).multinomial(1))

    return Prepared(lambda: run(logits, batch), check, num_bytes=logits.nbytes, baselines={"torch top-k": in_torch})

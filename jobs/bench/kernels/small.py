"""The small kernels, which move their operands once and compute little, beside the same in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.qkv
import kernels.quantized_kv
import kernels.rms_norm
import kernels.sampling
import kernels.silu_mul
from jobs.bench.kernels.case import Case, Prepared, fill
from kernels.attention_batch import new_kv_pages
from kernels.backend import norm_rope_write_kv
from kernels.compare import compare
from kernels.qkv import norm_rope_write_kv_triton

SIZES = {"cuda": (256, 4096, 14336, 128256), "cpu": (64, 1024, 2816, 32000), "interpreter": (3, 130, 70, 500)}
"""Rows, hidden size, feed-forward width, vocabulary."""
EPS = 1e-5


def cases(place: str, device: torch.device) -> Iterator[Case]:
    dtype = torch.float16 if place == "interpreter" else torch.bfloat16
    rows, hidden, width, vocab = SIZES[place]
    builders: dict[str, Callable[[], Prepared]] = {
        f"embed_rms_norm {rows}x{hidden}": lambda: embed_norm(place, rows, fill((vocab, hidden), dtype, device, 0)),
        f"add_rms_norm {rows}x{hidden}": lambda: add_norm(place, fill((rows, hidden), dtype, device, 0)),
        f"silu_mul {rows}x{width}": lambda: silu(place, fill((rows, 2 * width), dtype, device, 0)),
        f"norm_rope_write_kv {rows} tokens": lambda: write(place, rows, dtype, device, True, False),
        f"rope_write_kv {rows} tokens": lambda: write(place, rows, dtype, device, False, False),
        f"rope_write_kv int8 {rows} tokens": lambda: write(place, rows, dtype, device, False, True),
        f"sample {rows}x{vocab}": lambda: sample(place, fill((rows, vocab), torch.float32, device, 0, 4.0)),
    }
    for name, build in builders.items():
        yield Case("small", name, build)


def _version(place: str, module: Any, name: str) -> Callable[..., Any]:
    chosen: Callable[..., Any] = getattr(module, f"{name}_cpu" if place == "cpu" else f"{name}_triton")
    return chosen


def embed_norm(place: str, num_tokens: int, embedding: Tensor) -> Prepared:
    run = _version(place, kernels.rms_norm, "embed_rms_norm")
    num_words, width = embedding.shape
    weight = fill((width,), embedding.dtype, embedding.device, 1)
    token_ids = torch.randint(num_words, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(weight.device)

    def in_torch() -> tuple[Tensor, Tensor]:
        found = F.embedding(token_ids, embedding)
        return found, F.rms_norm(found, weight.shape, weight, EPS)

    def check() -> Any:
        found, normed = run(token_ids, embedding, weight, EPS)
        torch_found, torch_normed = in_torch()
        reference = kernels.rms_norm.rms_norm_reference(torch_found, weight, EPS)
        return torch.equal(found, torch_found) and compare(normed, torch_normed, reference)

    return Prepared(
        lambda: run(token_ids, embedding, weight, EPS),
        check,
        num_bytes=3 * num_tokens * width * embedding.itemsize,
        baselines={"torch": in_torch},
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


def write(
    place: str, num_tokens: int, dtype: torch.dtype, device: torch.device, has_norm: bool, to_int8: bool
) -> Prepared:
    """The projection of 32 heads of queries and 8 of keys and values, which is rotated again at each run."""
    qkv = fill((num_tokens, 48, 128), dtype, device, 0)
    weights = tuple(fill((128,), dtype, device, seed) for seed in (1, 2))
    norms = (weights[0], weights[1]) if has_norm else None
    num_pages = -(-num_tokens // 16) + 4
    slots = torch.randperm(num_pages * 16, generator=torch.Generator().manual_seed(0))[:num_tokens].to(device)
    positions = torch.arange(num_tokens, device=device)
    angles = positions[:, None].float() * 10000 ** (-torch.arange(64, device=device) / 64)
    tables = angles.cos(), angles.sin()

    def new_pages(to_int8: bool) -> tuple[Any, Any]:
        if to_int8:
            return kernels.quantized_kv.new_quantized_pages(num_pages, 8, 16, 128, device, place != "cpu")
        k_pages, v_pages = new_kv_pages(num_pages, 8, 16, 128, dtype, device)
        # The interpreter's memory is a CPU's, but the kernel's layout is the GPU's.
        return (k_pages.contiguous(), v_pages.contiguous()) if place == "interpreter" else (k_pages, v_pages)

    def run(qkv: Tensor, pages: tuple[Any, Any]) -> Tensor:
        chosen: Callable[..., Tensor] = norm_rope_write_kv if place == "cpu" else norm_rope_write_kv_triton
        return chosen(qkv, norms, EPS, positions, *tables, *pages, slots)

    def in_torch() -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.split((32, 8, 8), dim=1)
        if norms:
            q, k = (F.rms_norm(x, (128,), weight, EPS) for x, weight in zip((q, k), norms))
        return rotate(q), rotate(k)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.float().chunk(2, dim=-1)
        c, s = tables[0][:, None], tables[1][:, None]
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(x.dtype)

    def check() -> Any:
        dense = new_pages(False)
        q = run(qkv.clone(), dense)
        k, v = (x.transpose(1, 2).flatten(0, 1)[slots] for x in dense)
        reference = kernels.qkv.norm_rope_reference(qkv, 8, norms, EPS, positions, *tables)
        reports = [compare(*three) for three in zip((q, k), in_torch(), reference)]
        is_right = torch.equal(v, qkv[:, 40:])
        if to_int8:  # within half a step of what dense pages hold
            int8 = new_pages(True)
            is_right &= torch.equal(run(qkv.clone(), int8), q)
            for x, pages in zip((k, v), int8):
                error = (pages.dequantize().transpose(1, 2).flatten(0, 1)[slots] - x.float()).abs().amax(-1)
                is_right &= bool((error <= x.float().abs().amax(-1) / 127 * 0.501).all())
        return is_right and next((report for report in reports if not report.holds), reports[0])

    pages = new_pages(to_int8)
    page, offset = slots // 16, slots % 16

    def in_torch_to_pages() -> None:
        _, k = in_torch()
        pages[0][page, :, offset] = k
        pages[1][page, :, offset] = qkv[:, 40:]

    baselines: dict[str, Callable[[], Any]] = {} if to_int8 else {"torch": in_torch_to_pages}
    page_bytes = num_tokens * 16 * (128 + 4 if to_int8 else 128 * dtype.itemsize)
    num_bytes = qkv.nbytes + num_tokens * 32 * 128 * dtype.itemsize + page_bytes
    # Timed in place: how long it takes does not depend on the numbers.
    return Prepared(lambda: run(qkv, pages), check, num_bytes=num_bytes, baselines=baselines)


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

"""Attention over paged keys and values: one kernel for decode, verification and prefill chunks.

    o[t, n] = sum_j softmax_j(scale q[t, n] . k[j, n / G]) v[j, n / G],    t's position - window < j <= t's position

Where heads have sinks, exp(sink[n]) joins the softmax's sum; where draft tokens are a tree (kernels.draft_tree), they
see of each other what its mask says. Kwon et al. 2023 (PagedAttention), Dao 2023 (FlashAttention-2, split keys merged
by log-sum-exp). The work of a step is cut into parts by kernels/attention_plan.py: some query tokens against a range of
a page table. Where a token was in several parts, a second kernel merges them in a fixed order.

Shape letters as in kernels/attention_batch.py; G = N / K, R query rows of a tile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels.attention_batch import AttentionBatch
from kernels.attention_checks import check_attention, check_sinks
from kernels.attention_plan import LARGE_ROWS, SMALL_ROWS, plan_attention
from kernels.draft_tree import hidden_keys, is_seen_by_tree
from kernels.int8_attention import LOG2_E, attend_int8
from kernels.on_demand import triton_kernel
from kernels.quantized_kv import Pages, QuantizedPages

if TYPE_CHECKING:
    import triton.language as tl

KEYS_PER_TILE = 64
MERGE_ELEMENTS = 1024


@triton_kernel
def _attend_kernel(
    q,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    out,
    partial,
    partial_lse,
    parts,
    positions,
    trees,
    sinks,
    page_ids,
    scale,
    window,
    q_stride_token,
    q_stride_head,
    k_stride_page,
    k_stride_head,
    v_stride_page,
    v_stride_head,
    scales_stride_page,
    scales_stride_head,
    num_heads,
    head_dim,
    HEADS_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    TREES: tl.constexpr,
    SINKS: tl.constexpr,
    LOG2_E: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per part and key/value head. `scale` includes log2(e): the one base here is 2.

    Moves the keys and values of the part's range once, its queries once, and its result once. Numbers of fp8 pages go
    into the products without their scales (SCALED): that of a key multiplies its score, that of a value its weight.
    """
    part = parts + tl.program_id(0) * 6
    kv_head = tl.program_id(1).to(tl.int64)
    first_token = tl.load(part)
    num_tokens = tl.load(part + 1)
    if num_tokens == 0:  # padding, in a captured graph
        return
    table = page_ids + tl.load(part + 2)
    start = tl.load(part + 3)
    stop = tl.load(part + 4)
    first_slot = tl.load(part + 5)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = (first_token + row // HEADS_PER_KV).to(tl.int64)
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    row_inside = row // HEADS_PER_KV < num_tokens
    column_inside = column < head_dim if PADDED else column >= 0
    inside = row_inside[:, None] & column_inside[None, :]
    at_q = q + token[:, None] * q_stride_token + head[:, None] * q_stride_head + column[None, :]
    queries = tl.load(at_q, mask=inside, other=0.0)
    if SCALED and q.dtype.element_ty == tl.bfloat16:
        # A GPU converts e4m3 to float16. There the queries fit once they are divided by their largest.
        largest = tl.max(tl.abs(queries.to(tl.float32)), axis=1)
        largest = tl.where(largest > 0.0, largest, 1.0)
        queries = (queries.to(tl.float32) / largest[:, None]).to(tl.float16)
    position = tl.load(positions + token, mask=row_inside, other=-1)
    if WINDOWED:
        first_position = tl.load(positions + first_token)
        start = tl.maximum(start, tl.min(tl.where(row_inside, position, first_position)) - window + 1)
    if TREES:
        at_tree = trees + token * 3
        tree_start = tl.load(at_tree, mask=row_inside, other=0)
        low_bits = tl.load(at_tree + 1, mask=row_inside, other=0)
        high_bits = tl.load(at_tree + 2, mask=row_inside, other=0)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first_key in tl.range(start, stop, KEYS, num_stages=STAGES):
        key = first_key + tl.arange(0, KEYS)
        key_inside = key < stop
        page = tl.load(table + key // PAGE, mask=key_inside, other=0).to(tl.int64)
        in_page = (key % PAGE) * head_dim
        load_inside = key_inside[:, None] & column_inside[None, :]
        at_k = page * k_stride_page + kv_head * k_stride_head + in_page
        keys = tl.load(k_pages + at_k[:, None] + column[None, :], mask=load_inside, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if SCALED:
            at_scale = page * scales_stride_page + kv_head * scales_stride_head + key % PAGE
            k_scale = tl.load(k_scales + at_scale, mask=key_inside, other=0.0)
            if q.dtype.element_ty == tl.bfloat16:
                scores = scores * (k_scale[None, :] * largest[:, None])
            else:
                scores = scores * k_scale[None, :]
        if TREES:
            seen = key_inside[None, :] & is_seen_by_tree(key, tree_start, low_bits, high_bits)
        else:
            seen = key_inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen nothing yet has best = -inf, and -inf - -inf is no number.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        # Scaled after the subtraction, whose result is small: that rounds less than scaling the scores.
        weights = tl.exp2((scores - shift[:, None]) * scale)
        decay = tl.exp2((best - shift) * scale)
        total = total * decay + tl.sum(weights, axis=1)
        at_v = page * v_stride_page + kv_head * v_stride_head + in_page
        values = tl.load(v_pages + at_v[:, None] + column[None, :], mask=load_inside, other=0.0).to(queries.dtype)
        if SCALED:
            # 256 times, or a weight of float16 would be too small for its bits.
            weights = weights * (256.0 * tl.load(v_scales + at_scale, mask=key_inside, other=0.0))[None, :]
        acc = tl.dot(weights.to(queries.dtype), values, acc * decay[:, None], input_precision="ieee")
        best = new_best

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    if SINKS:
        # Where a token is in several parts, its sink joins when these are merged: once in either case.
        sink = tl.load(sinks + head, mask=row_inside, other=0.0) * LOG2_E
        divisor += tl.where(first_slot < 0, tl.exp2(sink - tl.where(empty, 0.0, best) * scale), 0.0)
    if SCALED:
        acc = acc * 0.00390625
    acc = acc / divisor[:, None]
    if first_slot < 0:
        at = (token * num_heads + head)[:, None] * head_dim + column[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    else:
        lse = tl.where(empty, float("-inf"), best * scale + tl.log2(tl.where(empty, 1.0, total)))
        slot = ((first_slot + row // HEADS_PER_KV).to(tl.int64) * num_heads) + head
        tl.store(partial + slot[:, None] * head_dim + column[None, :], acc, mask=inside)
        tl.store(partial_lse + slot, lse, mask=row_inside)


@triton_kernel
def _merge_kernel(
    partial,
    partial_lse,
    out,
    tokens,
    slot_starts,
    slots,
    sinks,
    num_heads,
    head_dim,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """One program per merged token and HEADS heads: out = sum of partials weighted by exp2(lse - largest lse).

    A sink is one more log-sum-exp, without values. Reads each partial result once (float32) and writes the output once.
    """
    index = tl.program_id(0)
    token = tl.load(tokens + index).to(tl.int64)
    if token < 0:  # padding
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    head_inside = head < num_heads
    inside = head_inside[:, None] & (column < head_dim)[None, :]
    start = tl.load(slot_starts + index)
    stop = tl.load(slot_starts + index + 1)
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    for i in range(start, stop):
        slot = tl.load(slots + i).to(tl.int64) * num_heads + head
        largest = tl.maximum(largest, tl.load(partial_lse + slot, mask=head_inside, other=0.0))
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK), tl.float32)
    for i in range(start, stop):
        slot = tl.load(slots + i).to(tl.int64) * num_heads + head
        weight = tl.exp2(tl.load(partial_lse + slot, mask=head_inside, other=0.0) - largest)
        total += weight
        values = tl.load(partial + slot[:, None] * head_dim + column[None, :], mask=inside, other=0.0)
        acc += weight[:, None] * values
    if SINKS:
        total += tl.exp2(tl.load(sinks + head, mask=head_inside, other=0.0) * LOG2_E - largest)
    at = (token * num_heads + head)[:, None] * head_dim + column[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def paged_attention_triton(
    q_TND: Tensor,
    k_pages_PKSD: Pages,
    v_pages_PKSD: Pages,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    deterministic: bool = False,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend every query token of a step, [T, N, D]; causal per request, but for its trees of drafts.

    deterministic: a token's bits depend on the token and its context alone (of a tree: on the slots of its ancestors
    too); a prompt's keys are then read once for each of its tokens. sinks_N: see kernels.backend.paged_attention.

    Head dimensions 8 to 256, also ones that are no power of two; 1 to 16 query heads per key/value head; any page
    size, and any strides of pages, page heads, tokens and query heads. Partial results take float32 [T', N, D], where
    T' counts a token once per part. Pages are of q's dtype, bfloat16, fp8 (kernels.fp8_kv), or int8 in pairs
    (kernels.int8_attention).
    """
    check_attention(q_TND, k_pages_PKSD, v_pages_PKSD, batch, scale, window)
    check_sinks(sinks_N, q_TND)
    num_tokens, num_heads, head_dim = q_TND.shape
    num_kv_heads = k_pages_PKSD.shape[1]
    out_TND = torch.empty((num_tokens, num_heads, head_dim), dtype=q_TND.dtype, device=q_TND.device)
    if not num_tokens:
        return out_TND
    key = ("triton_attention", num_heads // num_kv_heads, window, deterministic)
    plan = batch.cache.get(key)
    if plan is None:
        plan = plan_attention(batch, num_heads // num_kv_heads, window, q_TND.device, deterministic)
        batch.cache[key] = plan
    partial = torch.empty((plan.num_slots, num_heads, head_dim), dtype=torch.float32, device=q_TND.device)
    partial_lse = torch.empty((plan.num_slots, num_heads), dtype=torch.float32, device=q_TND.device)
    block = max(16, 1 << (head_dim - 1).bit_length())
    k_values, k_scales, scales_strides = _values_and_scales(k_pages_PKSD)
    v_values, v_scales, _ = _values_and_scales(v_pages_PKSD)
    for parts, rows in ((plan.small_parts, SMALL_ROWS), (plan.large_parts, LARGE_ROWS)):
        if not len(parts):
            continue
        if k_pages_PKSD.dtype == torch.int8:
            assert isinstance(k_pages_PKSD, QuantizedPages) and isinstance(v_pages_PKSD, QuantizedPages)
            outputs = out_TND, partial, partial_lse
            attend_int8(q_TND, k_pages_PKSD, v_pages_PKSD, outputs, plan, parts, rows, scale, window, sinks_N)
            continue
        _attend_kernel[(len(parts), num_kv_heads)](
            q_TND,
            k_values,
            v_values,
            k_scales,
            v_scales,
            out_TND,
            partial,
            partial_lse,
            parts,
            plan.positions_T,
            plan.positions_T if plan.trees_T3 is None else plan.trees_T3,
            partial if sinks_N is None else sinks_N,
            plan.page_ids,
            scale * LOG2_E,
            window or 0,
            q_TND.stride(0),
            q_TND.stride(1),
            k_values.stride(0),
            k_values.stride(1),
            v_values.stride(0),
            v_values.stride(1),
            *scales_strides,
            num_heads,
            head_dim,
            HEADS_PER_KV=num_heads // num_kv_heads,
            ROWS=rows,
            PAGE=batch.page_size,
            KEYS=keys_per_tile(rows, block, q_TND.device),
            BLOCK=block,
            PADDED=block != head_dim,
            WINDOWED=window is not None,
            TREES=plan.trees_T3 is not None,
            SINKS=sinks_N is not None,
            LOG2_E=LOG2_E,
            SCALED=isinstance(k_pages_PKSD, QuantizedPages),
            STAGES=stages_per_tile(block),
            num_warps=warps_per_tile(rows, block),
        )
    if plan.num_slots:
        heads = max(1, min(1 << (num_heads - 1).bit_length(), MERGE_ELEMENTS // block))
        _merge_kernel[(len(plan.merged_tokens), -(-num_heads // heads))](
            partial,
            partial_lse,
            out_TND,
            plan.merged_tokens,
            plan.merged_slot_starts,
            plan.merged_slots,
            partial if sinks_N is None else sinks_N,
            num_heads,
            head_dim,
            HEADS=heads,
            BLOCK=block,
            SINKS=sinks_N is not None,
            LOG2_E=LOG2_E,
            num_warps=4,
        )
    return out_TND


def _values_and_scales(pages: Pages) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Pages as the kernel takes them; dense ones stand in for the scales that they do not have, which are not read."""
    if isinstance(pages, QuantizedPages):
        return pages.values, pages.scales_PKS, pages.scales_PKS.stride()[:2]
    return pages, pages, (0, 0)


def keys_per_tile(rows: int, block: int, device: torch.device) -> int:
    """How many keys a program takes at once: half as many where their scores and values would not fit the registers.

    That is above 128 dimensions; and, found by compiling for sm_80, for large tiles of 128 before Hopper.
    """
    is_tight = block > 128 or (rows == LARGE_ROWS and block == 128 and not is_hopper(device))
    return KEYS_PER_TILE // 2 if is_tight else KEYS_PER_TILE


def warps_per_tile(rows: int, block: int) -> int:
    """4, or 8 above 128 dimensions, where the registers of 4 do not hold a large tile."""
    return 8 if rows == LARGE_ROWS and block > 128 else 4


def stages_per_tile(block: int) -> int:
    """How many tiles of keys are on their way at once: 3, or 2 where the registers do not hold what that takes."""
    return 2 if block > 128 else 3


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.0 or later, whose matrix instructions read from shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def paged_attention_reference(
    q_TND: Tensor,
    k_pages_PKSD: Tensor,
    v_pages_PKSD: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """One softmax over each query token's whole context, in `dtype`, returned in `dtype`; ignores groups."""
    outputs = []
    first = 0
    for request, (num_queries, num_context) in enumerate(zip(batch.query_lens, batch.context_lens)):
        page_ids = batch.page_ids[request]
        pages = torch.tensor([int(page) for page in page_ids], device=q_TND.device)
        heads_per_kv = q_TND.shape[1] // k_pages_PKSD.shape[1]
        k, v = (
            pages_PKSD[pages].transpose(1, 2).flatten(0, 1)[:num_context].to(dtype).repeat_interleave(heads_per_kv, 1)
            for pages_PKSD in (k_pages_PKSD, v_pages_PKSD)
        )
        q = q_TND[first : first + num_queries].to(dtype)
        scores = torch.einsum("tnd,cnd->ntc", q, k) * scale
        order = np.arange(num_context - num_queries, num_context)
        hidden = torch.from_numpy(hidden_keys(order, num_context, batch.trees.get(request), window)).to(q.device)
        scores.masked_fill_(hidden, -math.inf)
        if sinks_N is not None:
            scores = torch.cat((scores, sinks_N.to(dtype)[:, None, None].expand(-1, num_queries, 1)), 2)
        outputs.append(torch.einsum("ntc,cnd->tnd", scores.softmax(-1)[:, :, :num_context], v))
        first += num_queries
    return torch.cat(outputs)

"""Attention over int8 pages whose bytes lie two to a 16-bit unit: the kernel that kernels.paged_attention launches.

Memory delivers int8 keys and values faster than a GPU converts them one by one: an H200 has 6.9 to 7.5 instructions for
each, and taking a byte, widening it and bringing it into the order that a matrix instruction wants takes more. So a
unit pairs what two products need at the same place (kernels.quantized_kv): keys d and d + D/2 of one slot, which meet
two halves of a query; values of slots s and s + S/2, which meet the weights of two tiles of keys. A tile of units is
then loaded as any 16-bit operand, and becomes two tiles of numbers in registers, two instructions for two of them.

Shape letters as in kernels/attention_batch.py; R query rows of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attention_plan import LARGE_ROWS, AttentionPlan
from kernels.draft_tree import is_seen_by_tree
from kernels.on_demand import triton_kernel
from kernels.quantized_kv import QuantizedPages, check_pairs
from kernels.tuned import architecture_of

if TYPE_CHECKING:
    import triton.language as tl

KEYS_PER_TILE = 64
LOG2_E = math.log2(math.e)


@triton_kernel
def _planes(units, ASM: tl.constexpr, dtype: tl.constexpr):
    """int16 units to two tiles of dtype, from the lower and from the upper bytes: q, or with bfloat16 and ASM q / 64.

    Bytes hold q + 128. In float16 one becomes the low bits of 1024 + q + 128. bfloat16 has too few for that: there it
    is the whole of a number, (q + 128) 2**-133 (the smallest normal numbers are as far apart as those below them, which
    fma takes too), and 2**127 times that, minus 2, is exact.
    """
    if not ASM:
        wide = units.to(tl.int32)
        low = (wide & 255).to(tl.float32) - 128.0
        high = ((wide >> 8) & 255).to(tl.float32) - 128.0
        if dtype == tl.bfloat16:
            # Cut off rather than rounded, which AMD's has no instruction for: such numbers end before.
            low = (low.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(dtype, bitcast=True)
            high = (high.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(dtype, bitcast=True)
        else:
            low, high = low.to(dtype), high.to(dtype)
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 most, bias;
            mov.b32 most, 0x7F007F00;
            mov.b32 bias, 0xC000C000;
            prmt.b32 $0, $2, 0, 0x4240;
            prmt.b32 $1, $2, 0, 0x4341;
            fma.rn.bf16x2 $0, $0, most, bias;
            fma.rn.bf16x2 $1, $1, most, bias;
            }""",
            "=&r,=&r,r",
            [units],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 bias;
            mov.b32 bias, 0xE480E480;
            prmt.b32 $0, $2, 0x64646464, 0x4240;
            prmt.b32 $1, $2, 0x64646464, 0x4341;
            add.rn.f16x2 $0, $0, bias;
            add.rn.f16x2 $1, $1, bias;
            }""",
            "=&r,=&r,r",
            [units],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return low, high


@triton_kernel
def _is_seen(
    key,
    start,
    stop,
    position,
    tree_start,
    low_bits,
    high_bits,
    window,
    WINDOWED: tl.constexpr,
    TREES: tl.constexpr,
):
    """[R, keys]: which rows see which keys; keys out of [start, stop) are seen by none."""
    inside = (key >= start) & (key < stop)
    if TREES:
        seen = inside[None, :] & is_seen_by_tree(key, tree_start, low_bits, high_bits)
    else:
        seen = inside[None, :] & (key[None, :] <= position[:, None])
    if WINDOWED:
        seen = seen & (key[None, :] > position[:, None] - window)
    return seen


@triton_kernel
def _attend_int8_kernel(
    q,
    k_units,
    v_units,
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
    HEAD_DIM: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    WINDOWED: tl.constexpr,
    TREES: tl.constexpr,
    SINKS: tl.constexpr,
    LOG2_E: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per part, key/value head and ROWS of its rows. `scale` includes log2(e): the one base here is 2.

    Moves the bytes and scales of the part's range once, its queries once, and its result once. BLOCK and HALF: powers
    of two that D and D / 2 fit into. The scale of a key multiplies its score, that of a value its weight. D is a
    constant as half of an argument that is a multiple of 16 counts for odd: rows would be read two bytes at a time.
    """
    part = parts + tl.program_id(0) * 6
    kv_head = tl.program_id(1).to(tl.int64)
    first_token = tl.load(part)
    num_tokens = tl.load(part + 1)
    first_row = tl.program_id(2) * ROWS
    if first_row >= num_tokens * HEADS_PER_KV:  # a part of fewer rows, or padding in a captured graph
        return
    table = page_ids + tl.load(part + 2)
    start = tl.load(part + 3)
    stop = tl.load(part + 4)
    first_slot = tl.load(part + 5)

    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    half_column = tl.arange(0, HALF)
    token = (first_token + row // HEADS_PER_KV).to(tl.int64)
    head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
    row_inside = row // HEADS_PER_KV < num_tokens
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    column_inside = column < HEAD_DIM
    half_inside = half_column < HALF_DIM
    at_q = q + token[:, None] * q_stride_token + head[:, None] * q_stride_head + half_column[None, :]
    load_inside = row_inside[:, None] & half_inside[None, :]
    low_queries = tl.load(at_q, mask=load_inside, other=0.0)
    high_queries = tl.load(at_q + HALF_DIM, mask=load_inside, other=0.0)
    dtype: tl.constexpr = low_queries.dtype
    UNIT: tl.constexpr = 64.0 if ASM and dtype == tl.bfloat16 else 1.0  # see _planes
    position = tl.load(positions + token, mask=row_inside, other=-1)
    if WINDOWED:
        first_position = tl.load(positions + first_token)
        start = tl.maximum(start, tl.min(tl.where(row_inside, position, first_position)) - window + 1)
    tree_start, low_bits, high_bits = position, position, position
    if TREES:
        at_tree = trees + token * 3
        tree_start = tl.load(at_tree, mask=row_inside, other=0)
        low_bits = tl.load(at_tree + 1, mask=row_inside, other=0)
        high_bits = tl.load(at_tree + 2, mask=row_inside, other=0)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    # Of each row one sum per pair of keys: adding these up once saves two exchanges between warps at each turn.
    totals = tl.zeros((ROWS, KEYS // 2), tl.float32)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    UNITS: tl.constexpr = KEYS // 2
    PER_PAGE: tl.constexpr = PAGE // 2
    k_units += kv_head * k_stride_head
    v_units += kv_head * v_stride_head
    k_scales += kv_head * scales_stride_head
    v_scales += kv_head * scales_stride_head
    scale *= UNIT
    # Of each page the units 0 .. S/2 - 1, whose lower and upper keys are S/2 apart.
    for first in tl.range(start // PAGE * PER_PAGE, tl.cdiv(stop, PAGE) * PER_PAGE, UNITS, num_stages=STAGES):
        if PER_PAGE % UNITS == 0:  # a tile lies in one page
            in_page = first % PER_PAGE + tl.arange(0, UNITS)
            page_number = first // PER_PAGE
            low_key = page_number * PAGE + in_page
            page = tl.load(table + page_number).to(tl.int64)
        else:
            unit = first + tl.arange(0, UNITS)
            in_page = unit % PER_PAGE
            low_key = unit // PER_PAGE * PAGE + in_page
            page = tl.load(table + unit // PER_PAGE, mask=low_key < stop, other=0).to(tl.int64)
        high_key = low_key + PER_PAGE
        low_inside, high_inside = low_key < stop, high_key < stop
        at_k = (k_units + page * k_stride_page + in_page * HALF_DIM)[:, None] + half_column[None, :]
        low_units = tl.load(at_k, mask=low_inside[:, None] & half_inside[None, :], other=0)
        high_units = tl.load(at_k + PER_PAGE * HALF_DIM, mask=high_inside[:, None] & half_inside[None, :], other=0)
        at_scale = page * scales_stride_page + in_page
        k0, k1 = _planes(low_units, ASM, dtype)
        low_scores = tl.dot(low_queries, tl.trans(k0), input_precision="ieee")
        low_scores = tl.dot(high_queries, tl.trans(k1), low_scores, input_precision="ieee")
        k0, k1 = _planes(high_units, ASM, dtype)
        high_scores = tl.dot(low_queries, tl.trans(k0), input_precision="ieee")
        high_scores = tl.dot(high_queries, tl.trans(k1), high_scores, input_precision="ieee")
        low_scores *= (tl.load(k_scales + at_scale, mask=low_inside, other=0.0) * scale)[None, :]
        high_scores *= (tl.load(k_scales + at_scale + PER_PAGE, mask=high_inside, other=0.0) * scale)[None, :]
        low_seen = _is_seen(low_key, start, stop, position, tree_start, low_bits, high_bits, window, WINDOWED, TREES)
        high_seen = _is_seen(high_key, start, stop, position, tree_start, low_bits, high_bits, window, WINDOWED, TREES)
        low_scores = tl.where(low_seen, low_scores, float("-inf"))
        high_scores = tl.where(high_seen, high_scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(tl.maximum(low_scores, high_scores), axis=1))
        # A row that has seen nothing yet has best = -inf, and -inf - -inf is no number.
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        low_weights = tl.exp2(low_scores - shift[:, None])
        high_weights = tl.exp2(high_scores - shift[:, None])
        decay = tl.exp2(best - shift)
        totals = totals * decay[:, None] + (low_weights + high_weights)
        at_v = (v_units + page * v_stride_page + in_page * HEAD_DIM)[:, None] + column[None, :]
        v0, v1 = _planes(tl.load(at_v, mask=low_inside[:, None] & column_inside[None, :], other=0), ASM, dtype)
        low_weights *= tl.load(v_scales + at_scale, mask=low_inside, other=0.0)[None, :]
        high_weights *= tl.load(v_scales + at_scale + PER_PAGE, mask=high_inside, other=0.0)[None, :]
        acc = tl.dot(low_weights.to(dtype), v0, acc * decay[:, None], input_precision="ieee")
        acc = tl.dot(high_weights.to(dtype), v1, acc, input_precision="ieee")
        best = new_best

    total = tl.sum(totals, axis=1)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    if SINKS:
        # Where a token is in several parts, its sink joins when these are merged: once in either case.
        sink = tl.load(sinks + head, mask=row_inside, other=0.0) * LOG2_E
        divisor += tl.where(first_slot < 0, tl.exp2(sink - tl.where(empty, 0.0, best)), 0.0)
    acc = acc * (UNIT / divisor)[:, None]
    inside = row_inside[:, None] & column_inside[None, :]
    if first_slot < 0:
        at = (token * num_heads + head)[:, None] * HEAD_DIM + column[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    else:
        lse = tl.where(empty, float("-inf"), best + tl.log2(tl.where(empty, 1.0, total)))
        slot = ((first_slot + row // HEADS_PER_KV).to(tl.int64) * num_heads) + head
        tl.store(partial + slot[:, None] * HEAD_DIM + column[None, :], acc, mask=inside)
        tl.store(partial_lse + slot, lse, mask=row_inside)


def attend_int8(
    q_TND: Tensor,
    k_pages: QuantizedPages,
    v_pages: QuantizedPages,
    outputs: tuple[Tensor, Tensor, Tensor],
    plan: AttentionPlan,
    parts: Tensor,
    rows: int,
    scale: float,
    window: int | None,
    sinks_N: Tensor | None,
) -> None:
    """Launch the plan's small or large parts, of `rows` query rows each.

    outputs: the step's result [T, N, D], and for tokens that are in several parts, float32, the partial results
    [X, N, D] with their log-sum-exps [X, N]. Called by kernels.paged_attention, which checks the inputs.
    """
    check_pairs(k_pages, v_pages)
    out_TND, partial, partial_lse = outputs
    num_heads, head_dim = q_TND.shape[1:]
    num_kv_heads, page_size = k_pages.shape[1:3]
    block = max(16, 1 << (head_dim - 1).bit_length())
    half = max(16, 1 << (head_dim // 2 - 1).bit_length())
    tile = int8_tile(rows, block, architecture_of(q_TND.device))
    _attend_int8_kernel[(len(parts), num_kv_heads, rows // tile.rows)](
        q_TND,
        k_pages.values,
        v_pages.values,
        k_pages.scales_PKS,
        v_pages.scales_PKS,
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
        k_pages.values.stride(0),
        k_pages.values.stride(1),
        v_pages.values.stride(0),
        v_pages.values.stride(1),
        *k_pages.scales_PKS.stride()[:2],
        num_heads,
        HEAD_DIM=head_dim,
        HEADS_PER_KV=num_heads // num_kv_heads,
        ROWS=tile.rows,
        PAGE=page_size,
        KEYS=KEYS_PER_TILE,
        BLOCK=block,
        HALF=half,
        WINDOWED=window is not None,
        TREES=plan.trees_T3 is not None,
        SINKS=sinks_N is not None,
        LOG2_E=LOG2_E,
        ASM=q_TND.is_cuda and torch.version.hip is None and q_TND.dtype != torch.float32,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


@dataclass(frozen=True, slots=True)
class Int8Tile:
    """How a part runs: query rows of a program, its warps, and the stages of its loop over keys."""

    rows: int
    warps: int
    stages: int


def int8_tile(rows: int, block: int, architecture: str) -> Int8Tile:
    """The tile for parts of `rows` query rows: found by compiling, none spills.

    Three stages bring one tile of keys while another is worked on, five bring two: page ids take stages too. Above 128
    dimensions the registers hold 32 rows.
    """
    if rows == LARGE_ROWS:
        return Int8Tile(32 if block > 128 else rows, 4, 3)
    if architecture == "gfx942" or block > 128:
        return Int8Tile(rows, 4, 3)
    return Int8Tile(rows, 2 if block <= 64 else 4, 5)

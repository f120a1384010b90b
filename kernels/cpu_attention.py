"""Paged attention on a CPU: torch's flash kernel over pages in place, merged by log-sum-exp.

The flash kernel attends queries to keys that lie at constant strides; a request's keys lie in pages. Copying them
together for every layer and step costs more than attending to them, so the work of a step is cut into parts whose keys
do lie at constant strides, and the partial results are merged exactly (as in FlashAttention, arXiv 2205.14135):

- decode and verification (up to 32 query tokens of a request): one part per (request, page), all parts of requests
  with about as many queries in one call over the range of pages that they span; for very few requests, whose calls
  would be tiny, one part per request;
- prefix groups: one part per group, its shared pages against the queries of all its requests at once;
- prefill: a chunk against itself (causal, one padded call per bucket of lengths), and what it has in the cache before
  the chunk: page by page like a decode if that is short, else one part per request.

Grouped-query attention: the G = N / K query heads of a key/value head are laid side by side as query rows.
Shape letters as in `kernels.attention_batch`; X parts, R rows of queries, L queries of a part, C keys of a part.
Sliding windows take a plain path, one masked call per request, when a context is longer than the window. A tree of
drafts is verified as a sequence of them is, behind another mask. Attention sinks scale what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention_batch import AttentionBatch
from kernels.attention_checks import check_sinks
from kernels.draft_tree import TreeMask, check_trees, hidden_keys

MAX_WASTE = 1.3
"""Pages of a decode are read in place as one range while that range has at most this many times the pages in use;
beyond, they are gathered first (measured: a gather costs about as much as attending to as many pages again)."""

MAX_FEW_QUERIES = 32
"""Requests with at most so many query tokens attend page by page, others as prompts do."""

FEW_REQUESTS = 4
"""Up to so many requests attend in one call each: merging the results of their pages would take longer than that."""

FEW_PAGES = 16
"""For that, pages which do not lie together are copied together, if they are not many."""

FEW_PAGES_BEFORE = 2
"""Up to so many cached pages before a chunk of a prompt are attended to page by page."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(slots=True)
class _Parts:
    """L query rows per part, in one call. `rows_XL` is where results go: row T (one past the last) for what nobody
    asked for, such as holes in a range of pages that is read in place. `pages` may be many pages of one part."""

    query_rows_XL: Tensor
    rows_XL: Tensor
    pages: slice | Tensor
    mask_X1RC: Tensor


@dataclass(slots=True)
class _Chunks:
    """Chunks of similar length, padded on the right by repeating their last token (causality hides it)."""

    query_rows_XL: Tensor
    slots_XL: Tensor
    kept: Tensor  # positions of the unpadded rows in the flattened [X, L]
    rows: Tensor


@dataclass(slots=True)
class _Context:
    """Query rows [start, stop) against the first `num_tokens` tokens of `pages`, all of them visible."""

    start: int
    stop: int
    pages: slice | Tensor
    num_tokens: int


@dataclass(slots=True)
class _Merge:
    """Which partial results make which query rows: `single_parts` are the whole result of `single_rows`, those of all
    others are in `tables`. `is_in_order`: each part is the whole result of its own row."""

    is_in_order: bool
    single_rows: Tensor
    single_parts: Tensor
    tables: list[_MergeTable]


@dataclass(slots=True)
class _MergeTable:
    """Rows with about as many parts: those of `rows` are in `table`, padded with a part of weight 0 where `is_padding`.

    Were decodes, with a part for every page, in one table with the chunks of prompts beside them, which have two or
    three, that would be padded to the decodes' parts: such steps took half as long again."""

    rows: Tensor
    table_RM: Tensor
    is_padding_RM1: Tensor


@dataclass(slots=True)
class _Plan:
    parts: list[_Parts]
    chunks: list[_Chunks]
    contexts: list[_Context]
    merge: _Merge


def paged_attention_cpu(
    q_TND: Tensor,
    k_pages_PKSD: Tensor,
    v_pages_PKSD: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend every query token of a step to the tokens of its own request up to itself; returns [T, N, D].

    The step's own keys and values must already be in the pages. Any context length, any mixture of chunk lengths, trees
    of drafts (`batch.trees`), and sinks: see kernels.backend.paged_attention.
    """
    check_sinks(sinks_N, q_TND)
    num_tokens, num_heads, head_dim = q_TND.shape
    num_kv_heads = k_pages_PKSD.shape[1]
    q_TKGD = q_TND.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    k_KPSD, v_KPSD = k_pages_PKSD.transpose(0, 1), v_pages_PKSD.transpose(0, 1)
    if window is not None and max(batch.context_lens) > window:
        return _attend_windowed(q_TKGD, k_KPSD, v_KPSD, batch, scale, window, sinks_N).view_as(q_TND)

    plan = batch.cache.get("cpu_attention")
    if plan is None:
        plan = batch.cache["cpu_attention"] = _plan(batch, q_TND.dtype, num_heads // num_kv_heads)
    parts = [_attend_parts(parts, q_TKGD, k_KPSD, v_KPSD, scale) for parts in plan.parts]
    parts.extend(_attend_chunks(chunks, q_TKGD, k_KPSD, v_KPSD, scale) for chunks in plan.chunks)
    parts.extend(_attend_context(context, q_TKGD, k_KPSD, v_KPSD, scale) for context in plan.contexts)
    return _merge_parts(plan.merge, parts, q_TKGD, sinks_N)


def _plan(batch: AttentionBatch, dtype: torch.dtype, num_grouped: int) -> _Plan:
    size = batch.page_size
    check_trees(batch.trees, batch.query_lens)
    num_shared_pages = [0] * len(batch.query_lens)
    first_rows = [0]
    for num_queries in batch.query_lens:
        first_rows.append(first_rows[-1] + num_queries)

    contexts = []
    for group in batch.groups:
        stop = group.first_request + group.num_requests
        end = group.first_page + len(group.page_ids)
        num_shared_pages[group.first_request : stop] = [
            end
        ] * group.num_requests  # an inner group comes after its outer
        pages = _as_slice(group.page_ids)
        contexts.append(_Context(first_rows[group.first_request], first_rows[stop], pages, len(group.page_ids) * size))

    small: list[_Queries] = []
    befores: list[_Queries] = []
    prefills = []
    for request, num_queries in enumerate(batch.query_lens):
        num_shared, num_context = num_shared_pages[request], batch.context_lens[request]
        own_pages = batch.page_ids[request][num_shared : -(-num_context // size)]
        if num_queries <= MAX_FEW_QUERIES or request in batch.trees:
            num_seen = num_context - num_queries - num_shared * size + 1
            tree = batch.trees.get(request)
            small.append(_Queries(first_rows[request], num_queries, num_seen, 1, own_pages, tree))
            continue
        prefills.append(request)
        num_before = num_context - num_queries - num_shared * size
        pages_before = own_pages[: -(-num_before // size)]
        if len(pages_before) > FEW_PAGES_BEFORE:
            contexts.append(_Context(first_rows[request], first_rows[request + 1], _as_slice(pages_before), num_before))
        elif pages_before:
            befores.append(_Queries(first_rows[request], num_queries, num_before, 0, pages_before))

    parts = _plan_small(small, size, batch.num_tokens, dtype, num_grouped)
    parts += _plan_by_pages(befores, size, batch.num_tokens, dtype, num_grouped)
    chunks = [_plan_chunks(bucket, first_rows, batch) for bucket in _buckets(prefills, batch.query_lens)]
    rows = [part.rows_XL.flatten() for part in parts]
    rows.extend(chunk.rows for chunk in chunks)
    rows.extend(torch.arange(context.start, context.stop) for context in contexts)
    return _Plan(parts, chunks, contexts, _plan_merge(torch.cat(rows), batch.num_tokens))


@dataclass(frozen=True, slots=True)
class _Queries:
    """Consecutive query rows against pages: the first sees `num_seen` of their tokens, each further one `more_each`
    more, if they are no tree."""

    first_row: int
    num_queries: int
    num_seen: int
    more_each: int
    pages: Sequence[int]
    tree: TreeMask | None = None


_Reader = tuple[_Queries, int]
"""Queries, and how many tokens of their pages come before the part's."""


def _plan_small(
    requests: list[_Queries], page_size: int, num_tokens: int, dtype: torch.dtype, num_grouped: int
) -> list[_Parts]:
    if len(requests) <= FEW_REQUESTS:
        runs = [_as_slice(request.pages) for request in requests]
        if all(isinstance(run, slice) or len(run) <= FEW_PAGES for run in runs):
            return [
                _new_parts([(request, 0)], run, num_tokens, len(request.pages) * page_size, dtype, num_grouped)
                for request, run in zip(requests, runs)
            ]
    return _plan_by_pages(requests, page_size, num_tokens, dtype, num_grouped)


def _plan_by_pages(
    requests: list[_Queries], page_size: int, num_tokens: int, dtype: torch.dtype, num_grouped: int
) -> list[_Parts]:
    """One part per page, in one call for requests with about as many queries."""
    by_length: dict[int, list[_Queries]] = {}
    for request in requests:
        by_length.setdefault((request.num_queries - 1).bit_length(), []).append(request)
    return [_plan_pages(by_length[key], page_size, num_tokens, dtype, num_grouped) for key in sorted(by_length)]


def _plan_pages(
    requests: list[_Queries], page_size: int, num_tokens: int, dtype: torch.dtype, num_grouped: int
) -> _Parts:
    owners: list[tuple[int, _Reader]] = [
        (page, (request, i * page_size)) for request in requests for i, page in enumerate(request.pages)
    ]
    owners.sort(key=lambda owner: owner[0])
    first, last = owners[0][0], owners[-1][0]
    # A page with two readers cannot be read in place twice.
    pages: slice | Tensor
    if last - first + 1 <= MAX_WASTE * len(owners) and len({page for page, _ in owners}) == len(owners):
        by_page = dict(owners)
        readers = [by_page.get(page, _NOBODY) for page in range(first, last + 1)]
        pages = slice(first, last + 1)
    else:
        readers = [reader for _, reader in owners]
        pages = torch.tensor([page for page, _ in owners])
    return _new_parts(readers, pages, num_tokens, page_size, dtype, num_grouped)


_NOBODY: _Reader = (_Queries(0, 1, 0, 0, ()), 0)


def _new_parts(
    readers: list[_Reader], pages: slice | Tensor, num_tokens: int, num_keys: int, dtype: torch.dtype, num_grouped: int
) -> _Parts:
    """Queries are padded by repeating the last one. What a query may see nothing of is computed without a mask and
    goes to row T."""
    first_row_X, num_queries_X, num_seen_X, more_each_X = torch.tensor(
        [(q.first_row, q.num_queries, q.num_seen - num_before, q.more_each) for q, num_before in readers]
    ).unbind(1)
    steps_L = torch.arange(int(num_queries_X.max()))
    offsets_XL = torch.minimum(steps_L, num_queries_X[:, None] - 1)
    query_rows_XL = first_row_X[:, None] + offsets_XL
    num_seen_XL = num_seen_X[:, None] + more_each_X[:, None] * offsets_XL
    hidden_XLC = torch.arange(num_keys) >= num_seen_XL[:, :, None]
    for i, (queries, num_before) in enumerate(readers):
        if queries.tree is not None:
            order = np.arange(queries.num_queries) + queries.num_seen - 1
            hidden = hidden_keys(order, num_before + num_keys, queries.tree, None)[:, num_before:]
            hidden_XLC[i] = torch.from_numpy(hidden)[offsets_XL[i]]
    sees_nothing_XL = hidden_XLC.all(2)
    rows_XL = query_rows_XL.masked_fill(sees_nothing_XL | (steps_L >= num_queries_X[:, None]), num_tokens)
    hidden_XLC &= ~sees_nothing_XL[:, :, None]
    mask_XLC = torch.zeros(hidden_XLC.shape, dtype=dtype).masked_fill_(hidden_XLC, float("-inf"))
    return _Parts(query_rows_XL, rows_XL, pages, mask_XLC.repeat_interleave(num_grouped, 1)[:, None])


def _plan_merge(row_of_part: Tensor, num_tokens: int) -> _Merge:
    """Parts of row `num_tokens` are those that nobody asked for."""
    is_in_order = len(row_of_part) == num_tokens and bool((row_of_part == torch.arange(num_tokens)).all())
    order = row_of_part.argsort(stable=True)
    counts = torch.bincount(row_of_part, minlength=num_tokens + 1)
    starts = counts.cumsum(0) - counts
    single_rows = (counts[:num_tokens] == 1).nonzero().squeeze(1)
    tables = []
    num_parts, most = 1, int(counts[:num_tokens].max())
    while num_parts < most:
        fewest, num_parts = num_parts, 2 * num_parts
        rows = ((counts[:num_tokens] > fewest) & (counts[:num_tokens] <= num_parts)).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        steps_M = torch.arange(int(counts[rows].max()))
        is_padding_RM = steps_M >= counts[rows][:, None]
        table_RM = order[torch.where(is_padding_RM, starts[rows][:, None], starts[rows][:, None] + steps_M)]
        tables.append(_MergeTable(rows, table_RM, is_padding_RM[:, :, None]))
    return _Merge(is_in_order, single_rows, order[starts[single_rows]], tables)


def _buckets(requests: list[int], query_lens: list[int]) -> list[list[int]]:
    """Split requests by length so that padding at most doubles what a call computes."""
    buckets: dict[int, list[int]] = {}
    for request in requests:
        buckets.setdefault((query_lens[request] - 1).bit_length(), []).append(request)
    return [buckets[key] for key in sorted(buckets)]


def _plan_chunks(requests: list[int], first_rows: list[int], batch: AttentionBatch) -> _Chunks:
    lengths = torch.tensor([batch.query_lens[request] for request in requests])
    steps_L = torch.arange(int(lengths.max()))
    offsets_XL = torch.minimum(steps_L, lengths[:, None] - 1)
    query_rows_XL = torch.tensor([first_rows[request] for request in requests])[:, None] + offsets_XL
    positions_XL = torch.tensor([batch.context_lens[r] - batch.query_lens[r] for r in requests])[:, None] + offsets_XL
    num_pages = max(len(batch.page_ids[request]) for request in requests)
    table = torch.zeros(len(requests), num_pages, dtype=torch.int64)
    for i, request in enumerate(requests):
        table[i, : len(batch.page_ids[request])] = torch.as_tensor(batch.page_ids[request])
    size = batch.page_size
    slots_XL = table.gather(1, positions_XL // size) * size + positions_XL % size
    kept = (steps_L < lengths[:, None]).flatten().nonzero().squeeze(1)
    return _Chunks(query_rows_XL, slots_XL, kept, query_rows_XL.flatten()[kept])


def _as_slice(pages: Sequence[int]) -> slice | Tensor:
    """Pages in one ascending run can be read in place."""
    first = int(pages[0])
    if all(int(page) == first + i for i, page in enumerate(pages)):
        return slice(first, first + len(pages))
    return torch.as_tensor(pages, dtype=torch.int64)


def _select(pages_KPSD: Tensor, pages: slice | Tensor) -> Tensor:
    return pages_KPSD[:, pages] if isinstance(pages, slice) else pages_KPSD.index_select(1, pages)


def _attend_parts(plan: _Parts, q_TKGD: Tensor, k_KPSD: Tensor, v_KPSD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    num_parts, num_queries = plan.query_rows_XL.shape
    _, num_kv_heads, num_grouped, head_dim = q_TKGD.shape
    q_XLKGD = q_TKGD.index_select(0, plan.query_rows_XL.flatten()).view(num_parts, num_queries, *q_TKGD.shape[1:])
    q_XKRD = q_XLKGD.transpose(1, 2).reshape(num_parts, num_kv_heads, num_queries * num_grouped, head_dim)
    keys_shape = (num_kv_heads, num_parts, -1, head_dim)
    k_XKCD = _select(k_KPSD, plan.pages).reshape(keys_shape).transpose(0, 1)
    v_XKCD = _select(v_KPSD, plan.pages).reshape(keys_shape).transpose(0, 1)
    output, lse = _flash(q_XKRD, k_XKCD, v_XKCD, attn_mask=plan.mask_X1RC, scale=scale)
    output = output.view(num_parts, num_kv_heads, num_queries, num_grouped, head_dim).transpose(1, 2)
    lse = lse.view(num_parts, num_kv_heads, num_queries, num_grouped).transpose(1, 2)
    return output.flatten(0, 1), lse.flatten(0, 1)


def _attend_chunks(
    plan: _Chunks, q_TKGD: Tensor, k_KPSD: Tensor, v_KPSD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_chunks, length = plan.query_rows_XL.shape
    _, num_kv_heads, num_grouped, head_dim = q_TKGD.shape
    q = q_TKGD.index_select(0, plan.query_rows_XL.flatten()).view(
        num_chunks, length, num_kv_heads, num_grouped, head_dim
    )
    q = q.permute(0, 2, 3, 1, 4).reshape(num_chunks * num_kv_heads, num_grouped, length, head_dim)

    def keys_of(pages_KPSD: Tensor) -> Tensor:
        slots_KCD = pages_KPSD.flatten(1, 2).index_select(1, plan.slots_XL.flatten())
        x = slots_KCD.view(num_kv_heads, num_chunks, length, head_dim).transpose(0, 1)
        return x.reshape(num_chunks * num_kv_heads, 1, length, head_dim).expand(-1, num_grouped, -1, -1)

    output, lse = _flash(q, keys_of(k_KPSD), keys_of(v_KPSD), is_causal=True, scale=scale)
    output = output.view(num_chunks, num_kv_heads, num_grouped, length, head_dim).permute(0, 3, 1, 2, 4)
    lse = lse.view(num_chunks, num_kv_heads, num_grouped, length).permute(0, 3, 1, 2)
    return output.flatten(0, 1).index_select(0, plan.kept), lse.flatten(0, 1).index_select(0, plan.kept)


def _attend_context(
    plan: _Context, q_TKGD: Tensor, k_KPSD: Tensor, v_KPSD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q_RKGD = q_TKGD[plan.start : plan.stop]
    num_rows, num_kv_heads, num_grouped, head_dim = q_RKGD.shape
    q = q_RKGD.transpose(0, 1).reshape(1, num_kv_heads, num_rows * num_grouped, head_dim)
    k = _select(k_KPSD, plan.pages).flatten(1, 2)[None, :, : plan.num_tokens]
    v = _select(v_KPSD, plan.pages).flatten(1, 2)[None, :, : plan.num_tokens]
    output, lse = _flash(q, k, v, scale=scale)
    output = output.view(num_kv_heads, num_rows, num_grouped, head_dim).transpose(0, 1)
    return output, lse.view(num_kv_heads, num_rows, num_grouped).transpose(0, 1)


def _merge_parts(plan: _Merge, parts: list[tuple[Tensor, Tensor]], q_TKGD: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Put the result of every query row together: as it is where there is one part, else the sum of its parts, each
    weighted by exp(lse) over the sum of these. Sinks join each row's sum once, after that."""
    num_tokens, num_kv_heads, num_grouped, head_dim = q_TKGD.shape
    output_XND, lse_XN = (
        torch.cat([part[i].flatten(1, 2) for part in parts]) if len(parts) > 1 else parts[0][i].flatten(1, 2)
        for i in range(2)
    )
    if plan.is_in_order:
        return _with_sinks(output_XND, lse_XN, sinks_N)
    merged_TND = q_TKGD.new_empty(num_tokens, num_kv_heads * num_grouped, head_dim)
    if len(plan.single_rows):
        single_XND, single_lse_XN = (x.index_select(0, plan.single_parts) for x in (output_XND, lse_XN))
        merged_TND.index_copy_(0, plan.single_rows, _with_sinks(single_XND, single_lse_XN, sinks_N))
    for table in plan.tables:
        shape_RM = table.table_RM.shape
        lse_RMN = lse_XN.index_select(0, table.table_RM.flatten()).view(*shape_RM, -1)
        weight_RMN = _weigh(lse_RMN.masked_fill_(table.is_padding_RM1, float("-inf")), sinks_N)
        output_RMND = output_XND.index_select(0, table.table_RM.flatten()).view(*shape_RM, -1, head_dim)
        merged_RND = (output_RMND * weight_RMN.unsqueeze(-1)).sum(1).to(q_TKGD.dtype)
        merged_TND.index_copy_(0, table.rows, merged_RND)
    return merged_TND


def _weigh(lse_RMN: Tensor, sinks_N: Tensor | None) -> Tensor:
    """What each of a row's parts counts for."""
    if sinks_N is None:
        return lse_RMN.softmax(1)
    sink_R1N = sinks_N.expand(len(lse_RMN), 1, -1)
    return torch.cat((lse_RMN, sink_R1N), 1).softmax(1)[:, :-1]


def _with_sinks(output_XND: Tensor, lse_XN: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Whole results, as they are where exp(sink) joins the sum of which `lse` is the logarithm."""
    if sinks_N is None:
        return output_XND
    return (output_XND * (lse_XN - sinks_N).sigmoid_().unsqueeze(-1)).to(output_XND.dtype)


def _attend_windowed(
    q_TKGD: Tensor,
    k_KPSD: Tensor,
    v_KPSD: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int,
    sinks_N: Tensor | None,
) -> Tensor:
    check_trees(batch.trees, batch.query_lens)
    output = torch.empty_like(q_TKGD)
    size, row = batch.page_size, 0
    for request, num_queries in enumerate(batch.query_lens):
        num_context = batch.context_lens[request]
        first_query = num_context - num_queries
        first_page = max(0, first_query - window + 1) // size
        pages = _as_slice(batch.page_ids[request][first_page : -(-num_context // size)])
        first_key = first_page * size
        order = np.arange(first_query, num_context)
        tree = batch.trees.get(request)
        hidden = torch.from_numpy(hidden_keys(order, num_context, tree, window)[:, first_key:])
        mask = torch.zeros(hidden.shape, dtype=q_TKGD.dtype).masked_fill_(hidden, float("-inf"))
        q_KGLD = q_TKGD[row : row + num_queries].permute(1, 2, 0, 3)
        num_kv_heads, num_grouped = q_KGLD.shape[:2]
        num_keys = num_context - first_key
        k = _select(k_KPSD, pages).flatten(1, 2)[:, None, :num_keys].expand(-1, num_grouped, -1, -1)
        v = _select(v_KPSD, pages).flatten(1, 2)[:, None, :num_keys].expand(-1, num_grouped, -1, -1)
        attended, lse = _flash(q_KGLD, k, v, attn_mask=mask, scale=scale)
        attended, lse = attended.permute(2, 0, 1, 3), lse.permute(2, 0, 1)
        sinks_KG = None if sinks_N is None else sinks_N.view(num_kv_heads, num_grouped)
        output[row : row + num_queries] = _with_sinks(attended, lse, sinks_KG)
        row += num_queries
    return output

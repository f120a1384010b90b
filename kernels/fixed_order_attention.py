"""Paged attention on a CPU whose bits for a token depend on the token and its context alone: `deterministic: true`.

Prefill, decode and verification take one path. The query rows of a request (a row is one query head of a token, those
of a key/value head one after the other) are cut into tiles of a few fixed sizes, padded by repeating the last row. Each
tile attends to one page after the other, whole pages always, with what lies ahead masked, by torch's flash kernel,
which multiplies each tile and page on its own; and each page's result is merged into what came before by log-sum-exp,
in the order of the pages. So the page is the fixed split, and a result depends on the page size.

At load, tiles are compared bit by bit with the largest, as in `kernels.fixed_order_linear`. Prefix groups are not used:
shared pages are read once per request.

Shape letters as in kernels/attention_batch.py; X tiles, R rows of a tile, G = N / K.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention_batch import AttentionBatch
from kernels.attention_checks import check_sinks
from kernels.cpu_linear import dtype_name
from kernels.draft_tree import check_trees, depths, hidden_keys
from kernels.fixed_order_linear import with_threads

ROW_TILES = (8, 16, 32)
"""Below 64 rows the flash kernel multiplies without packing, which it would decide by the batch and the threads."""

GATHERED_BYTES = 1 << 20
"""Keys (and as many values) that are copied together for one call, at most, unless one tile takes more: they are read
once from the cache of a core."""

NOTHING_YET = -1e30
"""Log-sum of a row that has seen no page: any page's weight against it is exactly 1."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(slots=True)
class _PageStep:
    """The tiles [start, stop) of a set attend to one page each. `hidden_XRS` (None: nothing) is what they must
    not see, `blind_XR` the rows that see nothing of the page."""

    start: int
    stop: int
    pages_X: Tensor
    hidden_XRS: Tensor | None
    blind_XR: Tensor | None


@dataclass(slots=True)
class _TileSet:
    """Tiles of the same number of rows, those with the most pages first, few enough for a cache; rows index [T * G]."""

    rows_XR: Tensor
    kept: Tensor  # which of the flattened [X, R] are no padding
    steps: list[_PageStep]


@dataclass(slots=True)
class _Tokens:
    """What a step's query tokens see: keys of positions up to `last_T` and, of requests whose drafts are a tree, what
    `hidden_LC` of the request (C fills its pages) does not hide. A window ends at `position_T`."""

    position_T: Tensor
    last_T: Tensor
    hidden_LC: dict[int, Tensor]
    first_token: list[int]  # of each request


def fixed_order_attention_cpu(
    q_TND: Tensor,
    k_pages_PKSD: Tensor,
    v_pages_PKSD: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attend every query token of a step to the tokens of its own request up to itself; returns [T, N, D].

    The step's own keys and values must already be in the pages. Any context length, any mixture of chunk lengths, any
    window, and sinks (kernels.backend.paged_attention). Trees of drafts too (`batch.trees`): the bits of a token then
    depend on the slots of its ancestors as well, and are those of a sequence where the tree is one.
    """
    check_sinks(sinks_N, q_TND)
    num_tokens, num_heads, head_dim = q_TND.shape
    num_kv_heads = k_pages_PKSD.shape[1]
    num_grouped = num_heads // num_kv_heads
    key = ("fixed_order_attention", window)
    tile_sets = batch.cache.get(key)
    if tile_sets is None:
        row_tiles = agreeing_row_tiles(head_dim, batch.page_size, q_TND.dtype, torch.get_num_threads())
        page_bytes = num_kv_heads * batch.page_size * head_dim * q_TND.dtype.itemsize
        tile_sets = _plan(batch, num_grouped, window, row_tiles, max(1, GATHERED_BYTES // page_bytes))
        batch.cache[key] = tile_sets
    q_rows = q_TND.view(num_tokens, num_kv_heads, num_grouped, head_dim).transpose(1, 2).flatten(0, 1)
    out_rows = torch.empty_like(q_rows)
    for tiles in tile_sets:
        sinks_XKR1 = None
        if sinks_N is not None:
            sinks_XRK = sinks_N.view(num_kv_heads, num_grouped).t()[tiles.rows_XR % num_grouped]
            sinks_XKR1 = sinks_XRK.transpose(1, 2).unsqueeze(3).contiguous()
        k_KPSD, v_KPSD = k_pages_PKSD.transpose(0, 1), v_pages_PKSD.transpose(0, 1)
        attended_XRKD = _attend(tiles, q_rows, k_KPSD, v_KPSD, scale, sinks_XKR1)
        flat = attended_XRKD.flatten(0, 1).to(q_TND.dtype)
        out_rows.index_copy_(0, tiles.rows_XR.flatten()[tiles.kept], flat.index_select(0, tiles.kept))
    return out_rows.view(num_tokens, num_grouped, num_kv_heads, head_dim).transpose(1, 2).reshape(q_TND.shape)


def _plan(
    batch: AttentionBatch, num_grouped: int, window: int | None, row_tiles: tuple[int, ...], max_tiles: int
) -> list[_TileSet]:
    """Cut requests into tiles, each request into those that fit it best."""
    tokens = _lay_out_tokens(batch, window)
    tiles_of: dict[int, list[tuple[int, int, int, int, int]]] = {}
    first_row = 0
    for request, (num_queries, num_context) in enumerate(zip(batch.query_lens, batch.context_lens)):
        num_rows = num_queries * num_grouped
        size = next((tile for tile in row_tiles if tile >= num_rows), row_tiles[-1])
        for start in range(0, num_rows, size):
            count = min(size, num_rows - start)
            first, last = start // num_grouped, (start + count - 1) // num_grouped
            first_token = tokens.first_token[request]
            lowest = int(tokens.position_T[first_token + first : first_token + last + 1].min())
            oldest = 0 if window is None else max(0, lowest - window + 1)
            pages = (oldest // batch.page_size, (num_context - num_queries + last) // batch.page_size)
            tiles_of.setdefault(size, []).append((request, first_row + start, count, *pages))
        first_row += num_rows
    sets = []
    for size, tiles in tiles_of.items():
        # Most pages first: the i-th page's tiles are then the first ones. Among equals, later queries first: the tiles
        # that see the i-th page wholly come before those that need a mask.
        tiles.sort(key=lambda tile: (tile[3] - tile[4], -tile[1]))
        for start in range(0, len(tiles), max_tiles):
            part = tiles[start : start + max_tiles]
            sets.append(_plan_set(batch, part, size, tokens, num_grouped, window))
    return sets


def _lay_out_tokens(batch: AttentionBatch, window: int | None) -> _Tokens:
    check_trees(batch.trees, batch.query_lens)
    tokens = _Tokens(torch.zeros(0), torch.zeros(0), {}, [])
    positions, lasts, num_tokens = [], [], 0
    for request, (num_queries, num_context) in enumerate(zip(batch.query_lens, batch.context_lens)):
        order = np.arange(num_context - num_queries, num_context)
        position = last = order
        if request in batch.trees:
            mask = batch.trees[request]
            num_keys = -(-num_context // batch.page_size) * batch.page_size
            tokens.hidden_LC[request] = torch.from_numpy(hidden_keys(order, num_keys, mask, window))
            position, last = order[0] + depths(mask), np.full_like(order, order[0] - 1)
        positions.append(position)
        lasts.append(last)
        tokens.first_token.append(num_tokens)
        num_tokens += num_queries
    tokens.position_T, tokens.last_T = (torch.from_numpy(np.concatenate(x)) for x in (positions, lasts))
    return tokens


def _plan_set(
    batch: AttentionBatch,
    tiles: list[tuple[int, int, int, int, int]],
    size: int,
    tokens: _Tokens,
    num_grouped: int,
    window: int | None,
) -> _TileSet:
    """`tiles` are (request, first row, number of rows, first page, last page), sorted."""
    first_X = torch.tensor([tile[1] for tile in tiles])
    count_X = torch.tensor([tile[2] for tile in tiles])
    steps_R = torch.arange(size)
    rows_XR = first_X[:, None] + torch.minimum(steps_R, count_X[:, None] - 1)
    token_XR = rows_XR // num_grouped
    steps = []
    for i in range(tiles[0][4] - tiles[0][3] + 1):
        here = [(request, first + i) for request, _, _, first, last in tiles if first + i <= last]
        steps += _plan_page(batch, here, tokens, token_XR[: len(here)], window)
    return _TileSet(rows_XR, (steps_R < count_X[:, None]).flatten().nonzero().squeeze(1), steps)


def _plan_page(
    batch: AttentionBatch, here: list[tuple[int, int]], tokens: _Tokens, token_XR: Tensor, window: int | None
) -> list[_PageStep]:
    """Split tiles into the leading ones that see their pages wholly and those that need a mask.

    `here` are (request, which of its pages) of each tile."""
    page_size = batch.page_size
    pages_X = torch.tensor([int(batch.page_ids[request][page]) for request, page in here])
    first_key_X = torch.tensor([page * page_size for _, page in here])
    position_XR, last_XR = tokens.position_T[token_XR], tokens.last_T[token_XR]
    is_whole_X = first_key_X + page_size - 1 <= last_XR.amin(1)
    if window is not None:
        is_whole_X &= first_key_X > position_XR.amax(1) - window
    num_tiles, num_whole = len(pages_X), int(is_whole_X.long().cumprod(0).sum())
    steps = []
    if num_whole:
        steps.append(_PageStep(0, num_whole, pages_X[:num_whole], None, None))
    if num_whole < num_tiles:
        key_X1S = first_key_X[num_whole:, None, None] + torch.arange(page_size)
        hidden_XRS = key_X1S > last_XR[num_whole:, :, None]
        if window is not None:
            hidden_XRS |= key_X1S <= position_XR[num_whole:, :, None] - window
        for i, (request, page) in enumerate(here[num_whole:]):
            if request in tokens.hidden_LC:
                hidden_LS = tokens.hidden_LC[request][:, page * page_size : (page + 1) * page_size]
                hidden_XRS[i] = hidden_LS[token_XR[num_whole + i] - tokens.first_token[request]]
        blind_XR = hidden_XRS.all(2)
        # A row without any key would get no number; its result is given no weight instead.
        hidden_XRS &= ~blind_XR[:, :, None]
        steps.append(_PageStep(num_whole, num_tiles, pages_X[num_whole:], hidden_XRS, blind_XR))
    return steps


def _attend(
    tiles: _TileSet, q_rows: Tensor, k_KPSD: Tensor, v_KPSD: Tensor, scale: float, sinks_XKR1: Tensor | None
) -> Tensor:
    """float32 [X, R, K, D]. Only operations that round each value by itself merge the pages."""
    num_tiles, size = tiles.rows_XR.shape
    num_kv_heads, head_dim = q_rows.shape[1:]
    q_XRKD = q_rows.index_select(0, tiles.rows_XR.flatten()).view(num_tiles, size, num_kv_heads, head_dim)
    q_XKRD = q_XRKD.transpose(1, 2).contiguous()
    best_XKR1 = torch.full((num_tiles, num_kv_heads, size, 1), NOTHING_YET)
    total_XKR1 = torch.zeros_like(best_XKR1)
    merged_XKRD = torch.zeros(q_XKRD.shape)
    for step in tiles.steps:
        part = slice(step.start, step.stop)
        output, lse = _attend_page(q_XKRD[part], k_KPSD, v_KPSD, step, scale)
        best = torch.maximum(best_XKR1[part], lse)
        decay, weight = (best_XKR1[part] - best).exp_(), (lse - best).exp_()
        best_XKR1[part] = best
        total_XKR1[part].mul_(decay).add_(weight)
        merged_XKRD[part].mul_(decay).add_(output * weight)
    if sinks_XKR1 is not None:
        total_XKR1 += (sinks_XKR1 - best_XKR1).exp_()
    return merged_XKRD.div_(total_XKR1).transpose(1, 2)


def _attend_page(
    q_XKRD: Tensor, k_KPSD: Tensor, v_KPSD: Tensor, step: _PageStep, scale: float
) -> tuple[Tensor, Tensor]:
    """Each tile against its page: [X, K, R, D], and the log-sums [X, K, R, 1]."""
    k_XKSD = k_KPSD.index_select(1, step.pages_X).transpose(0, 1)
    v_XKSD = v_KPSD.index_select(1, step.pages_X).transpose(0, 1)
    mask = None
    if step.hidden_XRS is not None:
        mask = torch.zeros(step.hidden_XRS.shape, dtype=q_XKRD.dtype).masked_fill_(step.hidden_XRS, float("-inf"))
        mask = mask.unsqueeze(1)
    output_XKRD, lse_XKR = _flash(q_XKRD, k_XKSD, v_XKSD, attn_mask=mask, scale=scale)
    lse_XKR1 = lse_XKR.unsqueeze(3)
    if step.blind_XR is not None:
        lse_XKR1 = lse_XKR1.masked_fill(step.blind_XR[:, None, :, None], float("-inf"))
    return output_XKRD, lse_XKR1


@functools.lru_cache(maxsize=64)
def agreeing_row_tiles(head_dim: int, page_size: int, dtype: torch.dtype, num_threads: int) -> tuple[int, ...]:
    """The row tiles that give the bits of the largest one on one thread; ValueError when that is not among them."""
    check = _Check(head_dim, page_size, dtype)
    largest = ROW_TILES[-1]
    for count in {1, num_threads}:
        if not check.agrees(largest, count):
            raise ValueError(
                f"deterministic: with {count} threads, attention in {dtype_name(dtype)} with a head dimension of "
                f"{head_dim} and pages of {page_size} gives a row other bits at another place of a tile of {largest} "
                "rows; set another engine.dtype, engine.num_threads to 1, or deterministic to false"
            )
    return tuple(tile for tile in ROW_TILES if check.agrees(tile, num_threads))


class _Check:
    """Random queries, pages of keys and values, and what the largest tile makes of them.

    Keys come in pairs with opposite values, so that what comes out is the sums' rounding, which shows their order.
    """

    def __init__(self, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        half = (page_size + 1) // 2
        order_S = torch.randperm(2 * half, generator=self._generator)[:page_size]
        keys, values = self._random(half, head_dim), self._random(half, head_dim)
        self._k = torch.cat((keys, keys), dim=2)[:, :, order_S].to(dtype)
        self._v = torch.cat((values, -values), dim=2)[:, :, order_S].to(dtype)
        self._q = self._random(2 * ROW_TILES[-1], head_dim).to(dtype)
        self._scale = head_dim**-0.5
        every_row = torch.arange(self._q.shape[2])
        self._reference = with_threads(1, lambda: self._attend(every_row, ROW_TILES[-1]))

    def _random(self, length: int, head_dim: int) -> Tensor:
        return torch.randn(3, 2, length, head_dim, generator=self._generator)

    def agrees(self, tile: int, num_threads: int) -> bool:
        """Whether shuffled rows get the reference's bits, in a call of many parts and in one of a single part."""
        order = torch.randperm(self._q.shape[2], generator=self._generator)
        together = with_threads(num_threads, lambda: self._attend(order, tile))
        alone = with_threads(num_threads, lambda: self._attend(order, tile, num_parts=1, num_heads=1))
        expected = self._reference[:, :, order]
        return torch.equal(together, expected) and torch.equal(alone, expected[:1, :1])

    def _attend(self, rows: Tensor, tile: int, num_parts: int = 3, num_heads: int = 2) -> Tensor:
        q, k, v = (x[:num_parts, :num_heads] for x in (self._q[:, :, rows], self._k, self._v))
        results = [_flash(q_part, k, v, scale=self._scale) for q_part in q.split(tile, dim=2)]
        return torch.cat([torch.cat((output.float(), lse.float().unsqueeze(3)), 3) for output, lse in results], 2)

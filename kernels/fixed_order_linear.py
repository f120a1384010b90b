"""Linear layers whose bits for a row depend on that row and the weight alone: `deterministic: true`.

A matrix product's sums change their order with the number of rows, with the number of threads, and with whatever the
library chooses by these. So rows are padded to a few fixed numbers, the tiles, and at load each tile is compared, bit
by bit on random values, with a reference: the product by tiles of 64 rows (on a CPU by one thread). Rows are shuffled
meanwhile, so that places in the tile and neighbours count too. Only tiles that agree are used. No clock decides
anything. (He et al. 2025, "Defeating Nondeterminism in LLM Inference", name the causes.)

That a tile agrees is found per shape and dtype, not proven for all values; libraries choose by shape.
Shape letters: M rows of a call, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu_linear import Product, check_int4_fits, dense_product, dtype_name, fastest_cpu_dtype, int4_product

if TYPE_CHECKING:
    from kernels.int4_linear import QuantizedWeight

TILES = (1, 4, 16, 32, 48, 64, 128, 256)
REFERENCE_TILE = 64
CHECKED_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Numbers of rows, ascending, that give the reference's bits."""

    sizes: tuple[int, ...]
    on_one_thread: bool


class FixedOrderLinear:
    """y = x W^T + b over x [M, K], in calls of `tiles` rows; on one thread where more give other bits."""

    def __init__(self, product: Product, bias: Tensor | None, tiles: _Tiles, form: str) -> None:
        self._product, self._bias, self._form = product, bias, form
        self._tiles, self._on_one_thread = tiles.sizes, tiles.on_one_thread

    def __call__(self, x_MK: Tensor) -> Tensor:
        return with_threads(1, lambda: self._multiply(x_MK)) if self._on_one_thread else self._multiply(x_MK)

    def _multiply(self, x_MK: Tensor) -> Tensor:
        num_rows = len(x_MK)
        pieces: list[Tensor] = []
        start = 0
        while start < num_rows or not pieces:
            tile = next_tile(self._tiles, num_rows - start)
            rows_MK = x_MK[start : start + tile]
            if len(rows_MK) < tile:
                rows_MK = F.pad(rows_MK, (0, 0, 0, tile - len(rows_MK)))
            pieces.append(self._product(rows_MK, self._bias))
            start += tile
        return pieces[0][:num_rows] if len(pieces) == 1 else torch.cat(pieces)[:num_rows]

    def describe(self) -> str:
        """The form, and the numbers of rows that it is called with."""
        threads = " on one thread" if self._on_one_thread else ""
        return f"{self._form} in fixed tiles of {', '.join(map(str, self._tiles))} rows{threads}"


def next_tile(tiles: tuple[int, ...], num_rows: int) -> int:
    """How many rows to multiply next: the smallest tile that holds all if it is filled to three quarters or there is
    no smaller one, else the largest that fits."""
    holding = next((tile for tile in tiles if tile >= num_rows), None)
    fitting = next((tile for tile in reversed(tiles) if tile <= num_rows), None)
    if holding is not None and (fitting is None or 4 * num_rows >= 3 * holding):
        return holding
    assert fitting is not None
    return fitting


def prepare_fixed_order_linear(
    weight: Tensor | QuantizedWeight, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device, compute: str
) -> FixedOrderLinear:
    """Bring a weight [N, K] into the first form, in a fixed order, that agrees with itself.

    Quantised weights are decoded to `dtype`, except with compute "int4" on a CPU. For as many threads as torch has now.
    ValueError if no form agrees.
    """
    from kernels.int4_linear import dequantize

    bias = None if bias is None else bias.to(device=device, dtype=dtype)
    num_out, num_in = weight.shape
    if not isinstance(weight, Tensor) and compute == "int4" and weight.bits == 4:
        check_int4_fits(num_out, num_in, weight.group_size)
        form = f"int4 g{weight.group_size}"
        tiles = _choose_tiles(num_out, num_in, dtype, device, form, torch.get_num_threads())
        if tiles is None:
            raise _no_form(num_out, num_in, dtype, device)
        return FixedOrderLinear(int4_product(weight), bias, tiles, form)
    dense_NK = weight if isinstance(weight, Tensor) else dequantize(weight, dtype)
    dense_NK = dense_NK.to(device=device, dtype=dtype)
    for form in _dense_forms(dtype, device):
        tiles = _choose_tiles(num_out, num_in, dtype, device, form, torch.get_num_threads())
        if tiles is not None:
            name = f"{form} {dtype_name(dtype)}" + ("" if isinstance(weight, Tensor) else " copy")
            return FixedOrderLinear(dense_product(dense_NK, form), bias, tiles, name)
    raise _no_form(num_out, num_in, dtype, device)


def _dense_forms(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """By instructions and not by time: which form it is shows in the answers."""
    if device.type == "cuda":
        return ("plain",)
    if dtype != torch.float32 and fastest_cpu_dtype() == torch.float32:
        return ("upcast", "packed", "plain")
    return ("packed", "plain") if dtype == torch.float32 else ("packed", "plain", "upcast")


def _no_form(num_out: int, num_in: int, dtype: torch.dtype, device: torch.device) -> ValueError:
    return ValueError(
        f"deterministic: no way to multiply a weight [{num_out}, {num_in}] in {dtype_name(dtype)} on {device} gives "
        "a row the same bits at each place of a tile; set another engine.dtype, or deterministic to false"
    )


@functools.lru_cache(maxsize=256)
def _choose_tiles(
    num_out: int, num_in: int, dtype: torch.dtype, device: torch.device, form: str, num_threads: int
) -> _Tiles | None:
    """None where the reference itself differs from place to place.

    Which form is taken must not depend on the number of threads, as actors may differ in that. With several, libraries
    cut the sums of a narrow weight among them; one thread is then slower, and right.
    """
    if form == "packed" and not torch.backends.mkldnn.is_available():
        return None
    check = _Check(num_out, num_in, dtype, device, form)
    if not check.agrees(REFERENCE_TILE, num_threads=1):
        return None
    for count in (num_threads, 1):
        sizes = tuple(tile for tile in TILES if check.agrees(tile, count))
        if sizes:
            return _Tiles(sizes, on_one_thread=count < num_threads)
    return None


class _Check:
    """A weight of a shape, rows, and the reference's result for them.

    Values cancel, so that exact results would be 0 and what comes out is the sums' rounding: another order shows in
    most values, while with plain random ones a 16-bit result hides it in all but one of some thousands.
    """

    def __init__(self, num_out: int, num_in: int, dtype: torch.dtype, device: torch.device, form: str) -> None:
        self._generator = torch.Generator().manual_seed(0)
        order_K = torch.randperm(num_in, generator=self._generator)
        # A few different rows, repeated: numbers for a vocabulary of 100 000 take seconds to draw.
        drawn = self._random(min(num_out, 512), num_in, order_K, sign=-1)
        if form.startswith("int4"):
            self._product = int4_product(_as_int4(_repeat(drawn, num_out), int(form.removeprefix("int4 g"))))
        else:
            self._product = dense_product(_repeat(drawn.to(device=device, dtype=dtype), num_out), form)
        self._x_MK = self._random(CHECKED_ROWS, num_in, order_K, sign=1).to(device=device, dtype=dtype)
        self._bias_N = torch.randn(num_out, generator=self._generator).mul_(1e-6).to(device=device, dtype=dtype)
        self._reference_MN = with_threads(1, lambda: self._multiply(self._x_MK, REFERENCE_TILE))

    def _random(self, num_rows: int, num_in: int, order_K: Tensor, sign: int) -> Tensor:
        half = torch.randn(num_rows, num_in // 2, generator=self._generator)
        rest = torch.zeros(num_rows, num_in % 2)
        return torch.cat((half, sign * half, rest), dim=1)[:, order_K]

    def agrees(self, tile: int, num_threads: int) -> bool:
        """Whether shuffled rows, two tiles of them, get the reference's bits."""
        order = torch.randperm(CHECKED_ROWS, generator=self._generator)[: max(2 * tile, 8)].to(self._x_MK.device)
        y_MN = with_threads(num_threads, lambda: self._multiply(self._x_MK[order], tile))
        return torch.equal(y_MN, self._reference_MN[order])

    def _multiply(self, x_MK: Tensor, tile: int) -> Tensor:
        return torch.cat([self._product(rows_MK, self._bias_N) for rows_MK in x_MK.split(tile)])


def with_threads(num_threads: int, work: Callable[[], Tensor]) -> Tensor:
    """Run `work` with so many threads of torch, which are the process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def _repeat(rows: Tensor, num_rows: int) -> Tensor:
    return rows.repeat(-(-num_rows // len(rows)), 1)[:num_rows].contiguous()


def _as_int4(weight_NK: Tensor, group: int) -> QuantizedWeight:
    """Values of about -3 to 3 as int4 of one scale, so that what cancelled still does."""
    from kernels.int4_linear import QuantizedWeight

    num_out, num_in = weight_NK.shape
    return QuantizedWeight(
        q_NK=(weight_NK * 2).round().clamp(-7, 7).add(8).to(torch.uint8),
        scale_NG=torch.full((num_out, num_in // group), 0.37),
        group_size=group,
    )

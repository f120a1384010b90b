"""AWQ (Lin et al. 2023, arXiv:2306.00978): scale up the input channels that carry large activations, then round.

y = (x / s) (W diag(s))^T is the same layer, but rounding W diag(s) hurts the channels with large s less.
s = mean|x|^alpha, alpha by grid search for the least output error (section 3.2, equations 4 and 5); 1/s goes into
whatever makes x, so it costs nothing at run time. That is exact where the maker works channel by channel: the norm
before qkv and gate/up, the rows of `up` before `down`, and the rows of `v` before the output projection, where the
query heads that share a key/value head share their scales too. Then the range of each group is searched.

Output errors need no activations but their second moment: |(W - W_q) X|^2 = tr((W - W_q) X X^T (W - W_q)^T).

Shape letters: N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.quantizers.grid import Grid
from actors.quantizers.layer_walk import InputMoments, WalkedLayer
from actors.quantizers.rtn import quantize_rtn

NUM_ALPHAS = 20


def output_error(difference_NK: Tensor, second_KK: Tensor) -> float:
    """Mean squared change of a layer's outputs, summed over outputs, when its weight changes by so much."""
    return float(((difference_NK @ second_KK) * difference_NK).sum())


def scale_channels(layer: WalkedLayer, floats: dict[str, Tensor], part: str, moments: InputMoments, grid: Grid) -> None:
    """Rescale the inputs of `part` in `floats` and in `moments`, in place; the layer's function stays the same.

    floats: the layer's tensors before any rounding, by name. Those of `v_proj` (part "output") or `up_proj` ("down")
    change too, and are to be rounded again.
    """
    names = [layer.weight_name(linear) for linear in layer.linears(part)]
    magnitude_K = moments.mean_abs_K
    if part == "output":
        magnitude_K = _per_kv_head(layer, magnitude_K)
    scale_K = _search_scale([floats[name] for name in names], magnitude_K, moments.second_KK, grid)
    if scale_K is None:
        return
    scale_K = _fold(layer, floats, part, scale_K)
    for name in names:
        floats[name] = floats[name] * scale_K
    moments.mean_abs_K = moments.mean_abs_K / scale_K
    moments.second_KK = moments.second_KK / scale_K / scale_K.unsqueeze(1)


def _search_scale(weights: list[Tensor], magnitude_K: Tensor, second_KK: Tensor, grid: Grid) -> Tensor | None:
    """The best s, or None when not scaling is best."""
    best, least = None, torch.inf
    for i in range(NUM_ALPHAS):
        scale_K = magnitude_K.clamp(min=1e-4 * float(magnitude_K.max())).pow(i / NUM_ALPHAS)
        scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
        if not torch.isfinite(scale_K).all():
            return None  # the inputs are all zero
        error = sum(
            output_error(quantize_rtn(weight_NK * scale_K, grid).to_float() / scale_K - weight_NK, second_KK)
            for weight_NK in weights
        )
        if error < least:
            best, least = (scale_K if i else None), error
    return best


def _per_kv_head(layer: WalkedLayer, magnitude_K: Tensor) -> Tensor:
    """Mean over the query heads that read the same key/value head, for each of them."""
    a = layer.architecture
    per_head = magnitude_K.view(a.num_kv_heads, a.num_heads // a.num_kv_heads, a.head_dim)
    return per_head.mean(1, keepdim=True).expand_as(per_head).reshape(-1)


def _fold(layer: WalkedLayer, floats: dict[str, Tensor], part: str, scale_K: Tensor) -> Tensor:
    """Divide what makes the input of `part` by scale_K; returns the scales that were really divided by."""
    if part in ("qkv", "gate_up"):
        name = "input_layernorm.weight" if part == "qkv" else "post_attention_layernorm.weight"
        norm_H = floats[name]
        # The norm is stored in 16 bits: the weights take up what rounding it leaves.
        folded_H = (norm_H / scale_K).to(layer.dtype).float()
        is_zero_H = folded_H == 0
        floats[name] = torch.where(is_zero_H, norm_H, folded_H)
        return torch.where(is_zero_H, 1.0, norm_H / folded_H)
    maker, scale_N = "mlp.up_proj", scale_K
    if part == "output":
        a = layer.architecture
        maker = "self_attn.v_proj"
        scale_N = scale_K.view(a.num_kv_heads, -1, a.head_dim)[:, 0].reshape(-1)
    floats[maker + ".weight"] = floats[maker + ".weight"] / scale_N.unsqueeze(1)
    if maker + ".bias" in floats:
        floats[maker + ".bias"] = floats[maker + ".bias"] / scale_N
    return scale_K

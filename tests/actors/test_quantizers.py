"""Quantisers: the layer walk against transformers, methods against each other, files against compressed-tensors."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from actors.config import EngineConfig
from actors.engine import Engine
from actors.quantizers.awq import output_error, scale_channels
from actors.quantizers.checkpoint_writer import OutputError
from actors.quantizers.gptq import quantize_gptq
from actors.quantizers.grid import Grid, round_searched
from actors.quantizers.hqq import quantize_hqq
from actors.quantizers.layer_rounding import METHODS, round_weight
from actors.quantizers.layer_walk import PARTS, InputMoments, WalkedLayer, embed, order_sequences, walk
from actors.quantizers.packing import pack_bits, packed_tensors
from actors.quantizers.rtn import quantize_rtn
from actors.quantizers.run import QuantizeSettings, quantize
from actors.quantizers.sensitivity import Choice, bytes_for_bits, choose_bits, measure_sensitivity
from actors.requests import SamplingParams
from actors.weights.checkpoint import CheckpointError, open_checkpoint

CPU = torch.device("cpu")
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 9}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 24}),
]


def make_sequences(count: int = 12, seed: int = 0, low: int = 8, high: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]


def random_layer(num_out: int = 48, num_in: int = 128, spread: float = 6) -> tuple[torch.Tensor, InputMoments]:
    """A weight with a few outliers, and moments of correlated inputs whose sizes differ by up to exp(spread)."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_out, num_in, generator=generator) * 0.05
    weight[0, ::17] *= 8
    mix = torch.randn(num_in, num_in, generator=generator) / num_in**0.5
    x = torch.randn(600, num_in, generator=generator) @ mix
    x *= torch.rand(num_in, generator=generator).mul(spread).exp()
    return weight, InputMoments(x.abs().mean(0), x.T @ x / len(x))


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_the_walk_gives_the_logits_that_transformers_gives(model_zoo, family, settings) -> None:
    path = model_zoo.path(family, **settings)
    sequences, counted_from = order_sequences(make_sequences())
    logits = torch.cat(list(walk(open_checkpoint(str(path)), sequences, CPU)))
    model = model_zoo.reference(path)
    with torch.inference_mode():
        rows = [model(torch.tensor([ids])).logits[0, start:] for ids, start in zip(sequences, counted_from)]
    expected = torch.cat(rows)
    assert (logits - expected).abs().max() < 2e-4 * expected.abs().max()


def test_tokens_whose_context_another_sequence_has_are_not_counted_twice() -> None:
    ordered, counted_from = order_sequences([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [], [5, 6, 7, 8, 1, 1], [3]])
    assert dict(zip(map(tuple, ordered), counted_from)) == {
        (3,): 0,
        (5, 6, 7, 8): 0,
        (5, 6, 7, 8, 1, 1): 4,
        (5, 6, 9): 2,
    }


def test_moments_are_those_of_the_counted_tokens(model_zoo) -> None:
    checkpoint = open_checkpoint(str(model_zoo.path("qwen2")))
    states = embed(checkpoint.read("model.embed_tokens.weight"), [[5, 6, 7, 8], [5, 6, 9]])
    layer = WalkedLayer(checkpoint, 0, 8, CPU)
    moments = layer.input_moments(states, "output")
    rows = torch.cat(
        [
            layer.run(embed(checkpoint.read("model.embed_tokens.weight"), [ids]).x_TH[None], until="output")[0, start:]
            for ids, start in (([5, 6, 7, 8], 0), ([5, 6, 9], 2))
        ]
    )
    torch.testing.assert_close(moments.second_KK, rows.T @ rows / 5)
    torch.testing.assert_close(moments.mean_abs_K, rows.abs().mean(0))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 96), (3, 43), (1, 7), (16, 1)])
def test_bits_are_packed_as_compressed_tensors_packs_them(bits: int, shape: tuple[int, int]) -> None:
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    signed = (values.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_bits(values, bits), pack_to_int32(signed, bits))
    packed_on_rows = pack_bits(values.T.contiguous(), bits).T
    assert torch.equal(packed_on_rows, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(3, 64, False), Grid(8, None, True), Grid(4, 32, False)])
def test_every_method_ends_on_its_grid_with_scales_that_the_file_can_hold(method: str, grid: Grid) -> None:
    weight, moments = random_layer()
    weight[3] = 0
    rounded = round_weight(weight, grid, moments, method)
    num_groups = 1 if grid.group_size is None else 128 // grid.group_size
    assert rounded.q_NK.shape == weight.shape and int(rounded.q_NK.max()) <= grid.max_q
    assert rounded.scale_NG.shape == (48, num_groups) and bool((rounded.scale_NG > 0).all())
    assert torch.equal(rounded.scale_NG, rounded.scale_NG.to(grid.scale_dtype).float())
    assert (rounded.zero_NG is None) == grid.symmetric
    assert torch.equal(rounded.to_float()[3], torch.zeros(128))
    bound = 1.0 if grid.bits == 3 else 0.5 if grid.bits == 4 else 0.05
    assert (rounded.to_float() - weight).norm() < bound * weight.norm()


def test_methods_that_see_inputs_have_smaller_output_errors() -> None:
    weight, moments = random_layer()
    grid = Grid(4, 64, True)
    errors = {
        method: output_error(round_weight(weight, grid, moments, method).to_float() - weight, moments.second_KK)
        for method in METHODS
    }
    assert errors["gptq"] < 0.6 * errors["awq"] < 0.6 * errors["rtn"]


def test_hqq_has_a_smaller_p_norm_of_errors_than_rounding_to_the_full_range() -> None:
    weight, _ = random_layer()
    grid = Grid(3, 64, False)

    def p_norm(rounded: torch.Tensor) -> float:
        return float((rounded - weight).abs().pow(0.7).sum())

    assert p_norm(quantize_hqq(weight, grid).to_float()) < 0.97 * p_norm(quantize_rtn(weight, grid).to_float())


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest(act_order: bool) -> None:
    weight, _ = random_layer()
    grid = Grid(4, 32, True)
    expected = round_searched(weight, grid)
    rounded = quantize_gptq(weight, 3.0 * torch.eye(128), grid, act_order)
    assert torch.equal(rounded.q_NK, expected.q_NK) and torch.equal(rounded.scale_NG, expected.scale_NG)


def gptq_by_definition(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, damping: float) -> torch.Tensor:
    """Column by column with the inverse Hessian of the columns that are left, in float64: equation 2 of the paper."""
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    scale = round_searched(weight, grid, hessian.diagonal().float()).scale_NG.double()
    left, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for k in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[k:, k:])
        step = scale[:, k // (grid.group_size or 1)]
        rounded[:, k] = (left[:, k] / step).round().clamp(-grid.middle, grid.middle - 1) * step
        left[:, k:] -= ((left[:, k] - rounded[:, k]) / inverse[0, 0])[:, None] * inverse[0]
    return rounded


def test_gptq_is_the_papers_recursion_done_with_one_factorisation() -> None:
    weight, moments = random_layer(8, 160, spread=1)
    order = moments.second_KK.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], moments.second_KK[order][:, order]
    grid = Grid(4, 32, True)
    rounded = quantize_gptq(weight, hessian, grid).to_float().double()
    expected = gptq_by_definition(weight, hessian, grid, 0.01)
    # A float32 factor may tip a value that lies between two steps; those after it then differ too.
    assert (rounded == expected).float().mean() > 0.9
    ratio = output_error((rounded - weight).float(), hessian) / output_error((expected - weight).float(), hessian)
    assert 0.95 < ratio < 1.05


def test_gptq_takes_inputs_that_are_always_zero_and_refuses_nan() -> None:
    weight, moments = random_layer()
    moments.second_KK[5], moments.second_KK[:, 5] = 0, 0
    assert torch.isfinite(quantize_gptq(weight, moments.second_KK, Grid(4, 32, True)).to_float()).all()
    assert torch.isfinite(quantize_gptq(weight, torch.zeros(128, 128), Grid(4, 32, True)).to_float()).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_gptq(weight, torch.full((128, 128), torch.nan), Grid(4, 32, True))


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_awqs_scales_leave_the_layers_function_as_it_was(model_zoo, family, settings, part) -> None:
    checkpoint = open_checkpoint(str(model_zoo.path(family, **settings)))
    states = embed(checkpoint.read("model.embed_tokens.weight"), make_sequences())
    layer = WalkedLayer(checkpoint, 1, 64, CPU)
    x = states.x_TH[None, :30]
    expected, before = layer.run(x), dict(layer.weights)
    floats = dict(layer.weights)
    moments = layer.input_moments(states, part)
    # Very different sizes of input, so that there is something to scale.
    moments.mean_abs_K = moments.mean_abs_K * torch.linspace(0, 5, len(moments.mean_abs_K)).exp()
    moments.second_KK *= torch.outer(*[torch.linspace(0, 5, len(moments.mean_abs_K)).exp()] * 2)
    scale_channels(layer, floats, part, moments, Grid(3, None, True))
    layer.weights = floats
    assert any(not torch.equal(floats[name], before[name]) for name in floats)
    torch.testing.assert_close(layer.run(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "gptq", {"group_size": 32, "head": "int8"}),
        ("qwen2", "awq", {"group_size": 64, "head": "int4"}),
        ("qwen3", "hqq", {"group_size": None, "bits": 3}),
        ("mistral", "rtn", {"group_size": 32, "bits": 8}),
    ],
)
def test_transformers_and_the_engine_compute_what_was_written(model_zoo, tmp_path, family, method, options) -> None:
    path = model_zoo.path(family, torch.bfloat16, tie_word_embeddings=family == "qwen2")
    settings = QuantizeSettings(method=method, **options)
    result = quantize(
        open_checkpoint(str(path)),
        tmp_path / "out",
        settings,
        sequences=make_sequences(),
        held_out=make_sequences(4, 1),
    )
    written = open_checkpoint(str(tmp_path / "out"))
    ids = make_sequences(1, seed=5)[0]
    logits = torch.cat(list(walk(written, [ids], CPU)))
    model = model_zoo.reference(tmp_path / "out")
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()
    assert written.architecture.tied_head is (family == "qwen2" and settings.head == "16bit")
    assert result.divergence is not None and 0 < result.divergence.kl_mean < 5


def test_the_divergence_of_the_result_is_that_of_the_written_model(model_zoo, tmp_path) -> None:
    path = model_zoo.path("llama")
    held_out = make_sequences(6, seed=3)
    original = open_checkpoint(str(path))
    settings = QuantizeSettings(method="awq", group_size=32, head="int8")
    result = quantize(original, tmp_path / "out", settings, sequences=make_sequences(), held_out=held_out)
    a = torch.cat(list(walk(original, held_out, CPU))).log_softmax(-1)
    b = torch.cat(list(walk(open_checkpoint(str(tmp_path / "out")), held_out, CPU))).log_softmax(-1)
    expected = float((a.exp() * (a - b)).sum(-1).mean())
    assert result.divergence is not None
    assert result.divergence.kl_mean == pytest.approx(expected, rel=1e-3)
    assert result.divergence.num_tokens == len(a)


class CrashError(Exception):
    """The machine stops."""


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_crash_leaves_nothing_that_looks_finished_and_the_same_call_continues(model_zoo, tmp_path, stop_at) -> None:
    checkpoint = open_checkpoint(str(model_zoo.path("qwen3")))
    settings = QuantizeSettings(method="gptq", group_size=32)
    arguments: dict[str, Any] = dict(sequences=make_sequences(), held_out=make_sequences(4, 1))
    whole = quantize(checkpoint, tmp_path / "whole", settings, **arguments)

    def crash(done: int, total: int, what: str) -> None:
        if done == stop_at:
            raise CrashError

    with pytest.raises(CrashError):
        quantize(checkpoint, tmp_path / "out", settings, on_progress=crash, **arguments)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    if stop_at > 0:
        with pytest.raises(OutputError, match="begun with another settings"):
            quantize(checkpoint, tmp_path / "out", QuantizeSettings(method="rtn", group_size=32), **arguments)

    calls: list[int] = []
    again = quantize(
        checkpoint, tmp_path / "out", settings, on_progress=lambda done, total, what: calls.append(done), **arguments
    )
    assert calls[0] == stop_at
    assert again.divergence == whole.divergence and again.errors == whole.errors
    assert not (tmp_path / "out.partial").exists()
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_an_output_folder_with_files_is_refused(model_zoo, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        quantize(open_checkpoint(str(model_zoo.path("llama"))), tmp_path / "out", QuantizeSettings(method="rtn"))
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_what_cannot_be_quantised_is_refused_by_name(model_zoo, tmp_path) -> None:
    checkpoint = open_checkpoint(str(model_zoo.path("llama")))
    with pytest.raises(ValueError, match="needs calibration prompts"):
        quantize(checkpoint, tmp_path / "none", QuantizeSettings(method="awq"))
    quantize(checkpoint, tmp_path / "once", QuantizeSettings(method="rtn", group_size=32))
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize(open_checkpoint(str(tmp_path / "once")), tmp_path / "twice", QuantizeSettings(method="rtn"))
    with pytest.raises(ValueError, match="group_size is 48"):
        QuantizeSettings(group_size=48)


def test_a_weight_with_nan_is_refused_with_its_name(model_zoo, tmp_path) -> None:
    source = model_zoo.path("llama")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(open_checkpoint(str(broken)), tmp_path / "out", QuantizeSettings(method="rtn", group_size=32))
    assert not (tmp_path / "out").exists()


def test_layers_that_no_group_size_divides_stay_as_they_are(model_zoo, tmp_path) -> None:
    path = model_zoo.path("llama", intermediate_size=100)
    result = quantize(open_checkpoint(str(path)), tmp_path / "out", QuantizeSettings(method="rtn", group_size=128))
    assert result.kept == [f"model.layers.{i} down" for i in range(3)]
    written = open_checkpoint(str(tmp_path / "out"))
    assert written.packed_format("model.layers.0.mlp.down_proj") is None
    packed = written.packed_format("model.layers.0.mlp.up_proj")
    assert packed is not None and packed.group_size == 64
    original = open_checkpoint(str(path)).read("model.layers.2.mlp.down_proj.weight")
    assert torch.equal(written.read("model.layers.2.mlp.down_proj.weight"), original)


def test_zero_points_are_written_as_the_reader_reads_them(model_zoo, tmp_path) -> None:
    path = model_zoo.path("llama", torch.float16)
    settings = QuantizeSettings(method="hqq", group_size=32, symmetric=False)
    quantize(open_checkpoint(str(path)), tmp_path / "out", settings)
    original, written = open_checkpoint(str(path)), open_checkpoint(str(tmp_path / "out"))
    for linear in original.architecture.linears():
        if linear.name != "lm_head":
            rounded = quantize_hqq(original.read_linear(linear), Grid(4, 32, False, torch.float16))
            assert torch.equal(written.read_linear(linear), rounded.to_float())
            assert torch.equal(
                written.read(linear.name + ".weight_packed"),
                packed_tensors("x", rounded)["x.weight_packed"],
            )


def test_the_choice_of_bits_is_the_best_of_all_that_fit() -> None:
    generator = torch.Generator().manual_seed(2)
    choices = {}
    for index in range(6):
        size, kl = int(torch.randint(50, 400, (), generator=generator)), float(torch.rand((), generator=generator))
        choices[index, "qkv"] = [
            Choice(3, 3 * size, kl), Choice(4, 4 * size, kl / 5), Choice(8, 8 * size, kl / 90), Choice(16, 16 * size, 0)
        ]  # fmt: skip

    def best(budget: int) -> float:
        fitting = [some for some in itertools.product(*choices.values()) if sum(c.num_bytes for c in some) <= budget]
        return min(sum(choice.kl for choice in some) for some in fitting)

    least = sum(some[0].num_bytes for some in choices.values())
    for budget in (least, least + 137, least * 4 // 3, least * 2, least * 4, least * 9):
        bits = choose_bits(choices, budget)
        taken = [next(c for c in choices[part] if c.bits == bits[part]) for part in choices]
        assert sum(choice.num_bytes for choice in taken) <= budget
        assert sum(choice.kl for choice in taken) == pytest.approx(best(budget))
    with pytest.raises(ValueError, match="raise --target-bits"):
        choose_bits(choices, least - 1)


def test_parts_get_different_bits_and_transformers_and_the_engine_run_the_mix(model_zoo, tiny_llama, tmp_path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    settings = QuantizeSettings(method="gptq", group_size=32)
    choices = measure_sensitivity(checkpoint, make_sequences(), settings)
    for some in choices.values():
        kls = {choice.bits: choice.kl for choice in some}
        assert kls[3] > kls[8] > 0 == kls[16]
    plan = choose_bits(choices, bytes_for_bits(choices, checkpoint, 5.5))
    assert len(set(plan.values())) > 1
    result = quantize(checkpoint, tmp_path / "out", settings, sequences=make_sequences(), plan=plan)
    assert 4.5 < result.bits_per_weight <= 5.5
    written = open_checkpoint(str(tmp_path / "out"))
    for (index, part), bits in plan.items():
        name = {"qkv": "self_attn.k_proj", "output": "self_attn.o_proj", "gate_up": "mlp.up_proj"}.get(
            part, "mlp.down_proj"
        )
        packed = written.packed_format(f"model.layers.{index}.{name}")
        assert (16 if packed is None else packed.bits) == bits
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {b for b in plan.values() if b != 16}
    ids = make_sequences(1, seed=5)[0]
    model = model_zoo.reference(tmp_path / "out")
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    logits = torch.cat(list(walk(written, [ids], CPU)))
    assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()
    engine = Engine(EngineConfig(model=str(tmp_path / "out"), dtype="float32", device="cpu", linear_compute="dense"))
    answer = engine.generate([ids], SamplingParams(max_tokens=1, temperature=0))[0].outputs[0].token_ids
    assert answer == [int(logits[-1].argmax())]

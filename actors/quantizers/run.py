"""Quantises a checkpoint layer by layer: one layer in memory, finished layers on disk, and continues where it stopped.

Calibration sequences flow through the layers as they will be written, so each layer is rounded for the inputs that it
will see. Held-out sequences flow twice, through the original layers and through the rounded ones: at the end their
logits say how far the new model is from the old. Knows no prompts' files and no command line. Called by
`jobs.quantize` and the bench.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from actors.quantizers.checkpoint_writer import CheckpointWriter
from actors.quantizers.grid import Grid, round_searched
from actors.quantizers.layer_rounding import CALIBRATED_METHODS, RoundedLayer, round_layer
from actors.quantizers.layer_walk import (
    PARTS,
    HiddenStates,
    WalkedLayer,
    counted_logits,
    embed,
    head_weight,
    part_linears,
    rms_norm,
)
from actors.quantizers.packing import packed_tensors, quantization_config
from actors.weights.checkpoint import Checkpoint, CheckpointError
from actors.weights.quantization import GROUP_SIZES, fitting_group_size

Bits = Literal[3, 4, 8, 16]

HEAD_BITS = {"int4": 4, "int8": 8, "16bit": 16}

BitsPlan = Mapping[tuple[int, str], int]
"""Bits of each part of each layer; 16 leaves it as it is."""

OnProgress = Callable[[int, int, str], None]
"""Called with the number of finished shards, that of all, and what is being done."""


class QuantizeSettings(BaseModel):
    """What decides the output, apart from the model and the calibration data.

    group_size None: one scale per row. act_order: GPTQ takes columns by importance, with scales found beforehand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["rtn", "hqq", "awq", "gptq"] = "gptq"
    bits: Literal[3, 4, 8] = 4
    group_size: int | None = 128
    symmetric: bool = True
    head: Literal["int8", "int4", "16bit"] = "16bit"
    act_order: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size is {self.group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}, or channel"
            )
        return self


class Divergence(BaseModel):
    """How far the written model is from the original on held-out sequences, as long as they are; KL in nats."""

    num_tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float


class QuantizeResult(BaseModel):
    """What was done, for the model card and the table."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    settings: QuantizeSettings
    num_calibration_tokens: int
    bits_per_weight: float = Field(description="of the decoder's linear layers, scales and zero points included")
    num_bytes: int
    original_bytes: int
    seconds: float
    divergence: Divergence | None
    kept: list[str] = Field(description="linear layers that stay as they were, though asked to be rounded")
    errors: dict[str, float] = Field(description="layer.part: mean squared output error over the mean square")


def fitting_grid(num_in: int, bits: int, settings: QuantizeSettings, dtype: torch.dtype) -> Grid | None:
    """The grid of a layer with num_in inputs: the wanted group size or the next smaller that divides; None for none."""
    if bits == 16:
        return None
    group_size = None
    if settings.group_size is not None:
        group_size = fitting_group_size(num_in, settings.group_size)
        if group_size is None:
            return None
    # float16 scales only where the model is float16 anyway: bfloat16 never underflows.
    scale_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return Grid(bits, group_size, settings.symmetric, scale_dtype)


def plan_grids(
    checkpoint: Checkpoint, settings: QuantizeSettings, plan: BitsPlan | None
) -> dict[tuple[int, str], Grid | None]:
    """The grid of each (layer, part)."""
    return {
        (index, part): fitting_grid(
            part_linears(checkpoint.architecture, index, part)[0].num_in,
            settings.bits if plan is None else plan[index, part],
            settings,
            checkpoint.dtype,
        )
        for index in range(checkpoint.architecture.num_layers)
        for part in PARTS
    }


def quantize(
    checkpoint: Checkpoint,
    output: Path,
    settings: QuantizeSettings,
    *,
    sequences: Sequence[Sequence[int]] = (),
    held_out: Sequence[Sequence[int]] = (),
    plan: BitsPlan | None = None,
    device: torch.device | None = None,
    source_identity: str | None = None,
    make_card: Callable[[QuantizeResult], str] | None = None,
    extra_files: Mapping[str, str] | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
) -> QuantizeResult:
    """Write the quantised checkpoint to the folder `output`, or continue doing so.

    sequences: token ids to calibrate on (awq and gptq need them). held_out: sequences to measure the result on. plan:
    bits per layer and part instead of settings.bits. source_identity: changes when the source's weights do.
    ValueError for settings that do not fit, CheckpointError for a source that cannot be used, OutputError for an output
    folder that is in use; all before anything is written.
    """
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{checkpoint.uri} is quantised already; give the 16-bit checkpoint that it was made of")
    if settings.method in CALIBRATED_METHODS and not any(len(sequence) for sequence in sequences):
        raise ValueError(f"method {settings.method} needs calibration prompts; give --calibrate, or use hqq or rtn")
    run = _Run(checkpoint, output, settings, sequences, held_out, plan, device or torch.device("cpu"), source_identity)
    return run.finish(run.rounds(on_progress), make_card, dict(extra_files or {}))


class _Run:
    """The state of one `quantize`: the hidden states behind the last finished layer, and the writer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: Path,
        settings: QuantizeSettings,
        sequences: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
        plan: BitsPlan | None,
        device: torch.device,
        source_identity: str | None,
    ) -> None:
        self.checkpoint, self.settings, self.device = checkpoint, settings, device
        self.architecture = checkpoint.architecture
        self.grids = plan_grids(checkpoint, settings, plan)
        self.wanted = {key: settings.bits if plan is None else plan[key] for key in self.grids}
        self.head_grid = fitting_grid(
            self.architecture.hidden_size, HEAD_BITS[settings.head], settings, checkpoint.dtype
        )
        identity = {
            "settings": settings.model_dump(),
            "bits": {f"{index}.{part}": bits for (index, part), bits in self.wanted.items()},
            "model": [checkpoint.uri, source_identity, str(checkpoint.config.to_dict())],
            "calibration": _hash_sequences(sequences),
            "held_out": _hash_sequences(held_out),
        }
        self.writer = CheckpointWriter(output, self.architecture.num_layers + 2, identity)
        calibrated = settings.method in CALIBRATED_METHODS
        streams = {"calibration": sequences if calibrated else (), "original": held_out, "rounded": held_out}
        self.states = self._open_states({name: ids for name, ids in streams.items() if len(ids)})
        self.longest = max((max(states.lengths) for states in self.states.values()), default=1)
        self.num_calibration_tokens = self.states["calibration"].num_counted if "calibration" in self.states else 0

    @torch.inference_mode()
    def _open_states(self, streams: dict[str, Sequence[Sequence[int]]]) -> dict[str, HiddenStates]:
        embedding_VH = self.checkpoint.read("model.embed_tokens.weight")
        states = {name: embed(embedding_VH, sequences) for name, sequences in streams.items()}
        if self.writer.num_finished > 1:
            for name, x_TH in self.writer.state().items():
                states[name].x_TH = x_TH
        return states

    @torch.inference_mode()
    def rounds(self, on_progress: OnProgress) -> float:
        """Write all shards that are not there; returns the seconds that all of them took, earlier runs' included."""
        total = self.writer.num_shards
        for index in range(self.writer.num_finished, total):
            what = "embedding" if index == 0 else "head" if index == total - 1 else f"layer {index - 1}"
            on_progress(index, total, what)
            started = time.perf_counter()
            errors: dict[str, float] = {}
            if index == 0:
                tensors = {"model.embed_tokens.weight": self._stored("model.embed_tokens.weight")}
            elif index < total - 1:
                tensors, errors = self._round_layer(index - 1)
            else:
                tensors = self._head()
            state = {name: states.x_TH for name, states in self.states.items()} if 0 < index < total - 1 else {}
            note = {"seconds": time.perf_counter() - started, "errors": errors}
            if index == total - 1:
                state = self.writer.state()  # the divergence is measured from it
            self.writer.write_shard(tensors, note, state)
        on_progress(total, total, "done")
        return sum(note["seconds"] for note in self.writer.notes)

    def _stored(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def _round_layer(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        layer = WalkedLayer(self.checkpoint, index, self.longest, self.device)
        if "original" in self.states:
            layer.advance(self.states["original"])
        grids = {part: self.grids[index, part] for part in PARTS}
        states = self.states.get("calibration")
        rounded = round_layer(layer, grids, states, self.settings.method, self.settings.act_order)
        for name in ("calibration", "rounded"):
            if name in self.states:
                layer.advance(self.states[name])
        return self._layer_tensors(layer, rounded), {f"{index}.{part}": e for part, e in rounded.errors.items()}

    def _layer_tensors(self, layer: WalkedLayer, rounded: RoundedLayer) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, weight in rounded.rounded.items():
            tensors |= packed_tensors(layer.prefix + name.removesuffix(".weight"), weight)
        for name, value in rounded.floats.items():
            tensors[layer.prefix + name] = value.to(layer.dtype).cpu()
        return tensors

    def _head(self) -> dict[str, Tensor]:
        """The final norm and the head, which is the embedding unless it has a weight of its own or is rounded."""
        tensors = {"model.norm.weight": self._stored("model.norm.weight")}
        if self.head_grid is not None:
            weight_VH = head_weight(self.checkpoint).to(self.device)
            tensors |= packed_tensors("lm_head", round_searched(weight_VH, self.head_grid, self._head_importance()))
        elif not self.architecture.tied_head:
            tensors["lm_head.weight"] = self._stored("lm_head.weight")
        return tensors

    def _head_importance(self) -> Tensor | None:
        """Mean square of each of the head's inputs over the calibration tokens."""
        states = self.states.get("calibration")
        if states is None:
            return None
        norm_H = self._stored("model.norm.weight").to(self.device, torch.float32)
        total_H = torch.zeros(self.architecture.hidden_size, device=self.device)
        for batch in states.batches():
            x_TH = batch.counted(batch.pad(states.x_TH, self.device))
            total_H += rms_norm(x_TH, norm_H, self.architecture.rms_norm_eps).square().sum(0)
        return total_H / states.num_counted

    def finish(
        self, seconds: float, make_card: Callable[[QuantizeResult], str] | None, extra_files: dict[str, str]
    ) -> QuantizeResult:
        names = {
            linear.name: grid
            for (index, part), grid in self.grids.items()
            for linear in part_linears(self.architecture, index, part)
        }
        weights, size_bits = 0, 0
        for (index, part), grid in self.grids.items():
            for linear in part_linears(self.architecture, index, part):
                count = linear.num_out * linear.num_in
                weights += count
                plain_bytes = count * self.checkpoint.dtype.itemsize
                size_bits += 8 * (plain_bytes if grid is None else grid.bytes_of(linear.num_out, linear.num_in))
        original = sum(_num_bytes(self.checkpoint, name) for name in self.checkpoint.names())
        result = QuantizeResult(
            settings=self.settings,
            num_calibration_tokens=self.num_calibration_tokens,
            bits_per_weight=size_bits / weights,
            num_bytes=sum(path.stat().st_size for path in self.writer.partial.glob("model-*.safetensors")),
            original_bytes=original,
            seconds=seconds,
            divergence=self._divergence(),
            kept=sorted(
                f"model.layers.{index} {part}"
                for (index, part), grid in self.grids.items()
                if grid is None and self.wanted[index, part] != 16
            ),
            errors={key: error for note in self.writer.notes for key, error in note["errors"].items()},
        )
        config = copy.deepcopy(self.checkpoint.config)
        if self.head_grid is not None:
            config.tie_word_embeddings = False
        raw = json.loads(config.to_json_string(use_diff=False))
        raw["quantization_config"] = quantization_config(names, self.head_grid)
        card = make_card(result) if make_card is not None else plain_card(result)
        self.writer.finish(self.checkpoint.uri, raw, card, extra_files)
        return result

    @torch.inference_mode()
    def _divergence(self) -> Divergence | None:
        if "original" not in self.states:
            return None
        norm_H = self._stored("model.norm.weight")
        head_VH = head_weight(self.checkpoint).float()
        rounded_head_VH = head_VH
        if self.head_grid is not None:
            rounded_head_VH = round_searched(
                head_VH.to(self.device), self.head_grid, self._head_importance()
            ).to_float()
        eps = self.architecture.rms_norm_eps
        originals = counted_logits(self.states["original"], norm_H, head_VH, eps, self.device)
        rounded = counted_logits(self.states["rounded"], norm_H, rounded_head_VH, eps, self.device)
        return measure_divergence(zip(originals, rounded))


def measure_divergence(pairs: Iterator[tuple[Tensor, Tensor]]) -> Divergence:
    """KL(original || rounded) per token and the share of equal likeliest tokens, from logits [T, V] in pieces."""
    all_kl, num_same = [], 0
    for original_TV, rounded_TV in pairs:
        all_kl.append(kl_divergence(original_TV.log_softmax(-1), rounded_TV).cpu())
        num_same += int((original_TV.argmax(-1) == rounded_TV.argmax(-1)).sum())
    kl_T = torch.cat(all_kl)
    return Divergence(
        num_tokens=len(kl_T),
        kl_mean=float(kl_T.double().mean()),
        kl_p99=float(kl_T.kthvalue(max(1, -(-len(kl_T) * 99 // 100))).values),
        top1_agreement=num_same / len(kl_T),
    )


def kl_divergence(logprobs_TV: Tensor, other_logits_TV: Tensor) -> Tensor:
    """KL(P || Q) per row, from P's log-probabilities and Q's logits."""
    return (logprobs_TV.exp() * (logprobs_TV - other_logits_TV.log_softmax(-1))).sum(-1)


def plain_card(result: QuantizeResult) -> str:
    """The README.md of a checkpoint when nothing more is known than the result."""
    return f"Quantised by Shoal.\n\n```json\n{result.model_dump_json(indent=2)}\n```\n"


def _hash_sequences(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(map(int, ids)) for ids in sequences]).encode()).hexdigest()


def _num_bytes(checkpoint: Checkpoint, name: str) -> int:
    size = checkpoint.dtype.itemsize
    for length in checkpoint.shape(name):
        size *= length
    return size

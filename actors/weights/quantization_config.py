"""Reads the `quantization_config` of a config.json: GPTQ, AWQ and compressed-tensors.

Everything that is not supported is refused by its field, its value and what is supported. Called by `checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from actors.architecture import CheckpointError
from actors.weights.packed_formats import LayerRules, PackedFormat

SUPPORTED_FORMATS = (
    "gptq (checkpoint_format gptq or gptq_v2; 3, 4 or 8 bits)",
    "awq (version gemm, 4 bits, with zero points)",
    "compressed-tensors (pack-quantized integers of 3, 4 or 8 bits, by group or channel)",
)

Rule = tuple[re.Pattern[str], PackedFormat | None]


def parse_quantization(config: Mapping[str, Any] | None) -> LayerRules | None:
    """Read a `quantization_config`; None stays None. CheckpointError, naming the field, for what is not supported."""
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config is a {type(config).__name__}; it must be an object")
    method = config.get("quant_method")
    readers = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed_tensors}
    if method not in readers:
        raise CheckpointError(
            f"quant_method {method!r} is not supported; supported: {'; '.join(SUPPORTED_FORMATS)}. "
            "Use the model's 16-bit checkpoint, with quantization: int4 if wanted"
        )
    return LayerRules(tuple(readers[method](config)))


def _read_gptq(config: Mapping[str, Any]) -> Iterator[Rule]:
    checkpoint_format = config.get("checkpoint_format", config.get("format", "gptq"))
    if config.get("is_marlin_format"):
        checkpoint_format = "marlin"
    _require("checkpoint_format", checkpoint_format, "gptq", "gptq_v2")
    _require("pack_dtype", config.get("pack_dtype", "int32"), "int32")
    if not config.get("lm_head"):
        yield _exactly("lm_head"), None
    # Names within a layer; the others of the layer are plain.
    if chosen := _flat(config.get("modules_in_block_to_quantize") or ()):
        names = "|".join(re.escape(name) for name in chosen)
        yield re.compile(rf"model\.layers\.(?!(.*\.)?({names})$)"), None
    for key, changes in (config.get("dynamic") or {}).items():
        pattern = _pattern(f"dynamic.{key}", key.removeprefix("+:").removeprefix("-:"))
        if key.startswith("-:"):
            yield pattern, None
        else:
            yield pattern, _gptq_format({**config, **changes}, checkpoint_format, f"dynamic.{key}.")
    yield re.compile(""), _gptq_format(config, checkpoint_format, "")


def _gptq_format(config: Mapping[str, Any], checkpoint_format: str, where: str) -> PackedFormat:
    _require(f"{where}bits", config.get("bits"), 4, 8, 3)
    return PackedFormat(
        method="gptq",
        bits=config["bits"],
        group_size=_group_size(f"{where}group_size", config.get("group_size")),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)),
        stored_zero_offset=1 if checkpoint_format == "gptq" else 0,
    )


def _read_awq(config: Mapping[str, Any]) -> Iterator[Rule]:
    _require("version", str(config.get("version", "gemm")).lower(), "gemm")
    _require("bits", config.get("bits", config.get("w_bit")), 4)
    _require("zero_point", config.get("zero_point", True), True)
    group_size = _group_size("group_size", config.get("group_size", config.get("q_group_size")))
    for part in config.get("modules_to_not_convert") or ():
        yield re.compile(f".*{re.escape(part)}"), None
    yield _exactly("lm_head"), None
    yield re.compile(""), PackedFormat("awq", bits=4, group_size=group_size, symmetric=False)


def _read_compressed_tensors(config: Mapping[str, Any]) -> Iterator[Rule]:
    """A target or ignored layer is an exact name, `re:` and a regular expression, or the class name `Linear`."""
    _require("quantization_status", config.get("quantization_status", "compressed"), "compressed")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups")
    for target in config.get("ignore") or ():
        yield _target("ignore", target), None
    formats = {name: _compressed_format(name, group, config.get("format")) for name, group in groups.items()}
    targets = [(target, name) for name, group in groups.items() for target in group.get("targets") or ()]
    # A name is more specific than a pattern, and a pattern than a class, whichever group comes first.
    for target, name in sorted(targets, key=lambda item: 2 if item[0] == "Linear" else item[0].startswith("re:")):
        yield _target(f"config_groups.{name}.targets", target), formats[name]


def _compressed_format(name: str, group: Any, format: str | None) -> PackedFormat:
    where = f"config_groups.{name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"{where} has no weights; only a group written out in full is supported")
    weights = group["weights"]
    _require(f"{where}.format", group.get("format") or format, "pack-quantized")
    _require(f"{where}.input_activations", group.get("input_activations"), None)
    _require(f"{where}.output_activations", group.get("output_activations"), None)
    _require(f"{where}.weights.num_bits", weights.get("num_bits"), 4, 8, 3)
    _require(f"{where}.weights.type", weights.get("type", "int"), "int")
    _require(f"{where}.weights.dynamic", bool(weights.get("dynamic")), False)
    _require(f"{where}.weights.strategy", weights.get("strategy"), "group", "channel")
    # "group" stores the order of inputs; "weight" and "static" only changed how the weights were found.
    actorder = weights.get("actorder")
    _require(f"{where}.weights.actorder", actorder, None, False, "group", "weight", "static")
    by_group = weights["strategy"] == "group"
    return PackedFormat(
        method="compressed-tensors",
        bits=weights["num_bits"],
        group_size=_group_size(f"{where}.weights.group_size", weights.get("group_size")) if by_group else None,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=actorder == "group",
    )


def _exactly(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name) + r"\Z")


def _target(field: str, target: str) -> re.Pattern[str]:
    if target.startswith("re:"):
        return _pattern(field, target.removeprefix("re:"))
    return re.compile("") if target == "Linear" else _exactly(target)


def _pattern(field: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(
            f"quantization_config: {field} has the broken regular expression {text!r}: {error}"
        ) from error


def _flat(names: Any) -> list[str]:
    """Names that stand alone or in lists."""
    return [name for item in names for name in ([item] if isinstance(item, str) else item)]


def _group_size(field: str, value: Any) -> int | None:
    """-1 is one group per row."""
    if value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"quantization_config: {field} is {value!r}; it must be a positive integer or -1")
    return value


def _require(field: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        supported = ", ".join(repr(choice) for choice in allowed)
        raise CheckpointError(
            f"quantization_config: {field} is {value!r}, which is not supported; supported: {supported}. "
            f"Formats that can be read: {'; '.join(SUPPORTED_FORMATS)}"
        )

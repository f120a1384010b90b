"""Writes a checkpoint directory shard by shard, so that it is either whole or does not look like one.

Everything goes to `<output>.partial`; the index and config.json come last, and then the folder is renamed. A manifest
in it says which shards are finished, by which settings: the next run continues there or refuses. Knows no layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.weights.checkpoint import open_filesystem

INDEX = "model.safetensors.index.json"
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
NOT_COPIED = ("config.json", INDEX, "quantize_config.json", "eval.json")
MAX_COPIED_BYTES = 256 << 20


class OutputError(ValueError):
    """The output folder cannot be used; the message says why and the way out."""


class CheckpointWriter:
    """A checkpoint of `num_shards` shards being written, or continued.

    identity: what decides the output; a partial folder of another identity is refused. notes: kept from earlier runs.
    """

    def __init__(self, output: Path, num_shards: int, identity: dict[str, Any]) -> None:
        self.output, self.num_shards = output, num_shards
        self.partial = output.with_name(output.name + ".partial")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output} exists and is not empty; name another folder, or delete it")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._manifest_path = self.partial / "manifest.json"
        self._manifest = self._open_manifest(json.loads(json.dumps(identity)))

    def _open_manifest(self, identity: dict[str, Any]) -> dict[str, Any]:
        if not self._manifest_path.exists():
            return {"identity": identity, "num_shards": 0, "notes": []}
        manifest = json.loads(self._manifest_path.read_text())
        differing = sorted(
            key for key in {*identity, *manifest["identity"]} if identity.get(key) != manifest["identity"].get(key)
        )
        if differing:
            raise OutputError(
                f"{self.partial} was begun with another {', '.join(differing)}; delete it, or name another folder"
            )
        return manifest

    @property
    def num_finished(self) -> int:
        """Shards that are written: the next call of `write_shard` is for the shard of this number."""
        return self._manifest["num_shards"]

    @property
    def notes(self) -> list[dict[str, Any]]:
        """What `write_shard` was told about each finished shard."""
        return self._manifest["notes"]

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write_shard(self, tensors: dict[str, Tensor], note: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Write the next shard, and what is needed to continue behind it; then it counts as finished."""
        index = self.num_finished
        self._save(self.shard_name(index), tensors)
        if state:
            self._save(f"state-{index}.safetensors", state)
        self._manifest["num_shards"] = index + 1
        self._manifest["notes"].append(note)
        self._write_json(self._manifest_path.name, self._manifest)
        for old in self.partial.glob("state-*.safetensors"):
            if old.name != f"state-{index}.safetensors":
                old.unlink()

    def state(self) -> dict[str, Tensor]:
        """The state that came with the last finished shard."""
        path = self.partial / f"state-{self.num_finished - 1}.safetensors"
        return load_file(path) if path.exists() else {}

    def finish(self, source_uri: str, config: dict[str, Any], card: str, extra: dict[str, str]) -> None:
        """Copy the source's small files, write card, index and config.json, and give the folder its name."""
        copy_small_files(source_uri, self.partial)
        for name, text in {"README.md": card, **extra}.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        weight_map, total_bytes = self._weight_map()
        for state in self.partial.glob("state-*.safetensors"):
            state.unlink()
        self._write_json(INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        self._manifest_path.unlink()
        self._write_json("config.json", config)
        if self.output.exists():
            self.output.rmdir()
        self.partial.rename(self.output)

    def _weight_map(self) -> tuple[dict[str, str], int]:
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for index in range(self.num_shards):
            path = self.partial / self.shard_name(index)
            with safe_open(path, "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            total_bytes += path.stat().st_size
        return weight_map, total_bytes

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        path = self.partial / (name + ".new")
        save_file(whole, path, metadata={"format": "pt"})
        path.chmod(self._manifest_mode())  # safetensors makes files that only their owner can read
        (self.partial / (name + ".new")).replace(self.partial / name)

    def _manifest_mode(self) -> int:
        """The permissions that an ordinary new file gets here."""
        if not self._manifest_path.exists():
            self._write_json(self._manifest_path.name, self._manifest)
        return self._manifest_path.stat().st_mode & 0o777

    def _write_json(self, name: str, value: Any) -> None:
        (self.partial / (name + ".new")).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        (self.partial / (name + ".new")).replace(self.partial / name)


def copy_small_files(uri: str, folder: Path) -> None:
    """Copy tokenizer, generation_config.json and the like from a model directory."""
    filesystem, path = open_filesystem(uri)
    for entry in filesystem.ls(path, detail=True):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        is_wanted = name.endswith(COPIED_SUFFIXES) and name not in NOT_COPIED and entry["size"] <= MAX_COPIED_BYTES
        if entry["type"] != "directory" and is_wanted:
            with filesystem.open(entry["name"], "rb") as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)

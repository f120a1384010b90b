"""Tiny random models of each family, as Hugging Face directories made on the spot by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


class ModelZoo:
    """Makes model directories below a folder, each once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def path(self, family: str, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **settings: Any) -> Path:
        """A directory with seeded random weights: settings are config fields on top of SMALL.

        Weights are large enough for the argmax to move from token to token; norms and biases are random too, since
        transformers would make them ones and zeros, which hide mistakes.
        """
        key = json.dumps([family, str(dtype), shard_size, settings], sort_keys=True)
        if key not in self.made:
            config_class, model_class = CLASSES[family]
            torch.manual_seed(len(key))
            model = model_class(config_class(**{**SMALL, **settings}))
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.normal_(0.0, 0.15)
                    if "norm" in name:
                        weight.add_(1.0)
            path = self.root / f"{family}-{len(self.made)}"
            model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
            self.made[key] = path
        return self.made[key]

    @staticmethod
    def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The same model as transformers runs it."""
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.fixture(scope="session")
def model_zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    return ModelZoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_llama(model_zoo: ModelZoo) -> Path:
    """A llama of SMALL's sizes with a tokenizer: a token per printable ASCII character, after <s> and </s>."""
    path = model_zoo.path("llama")
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path

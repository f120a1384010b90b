"""What tests of pipeline and jobs share: one Ray for the session, a tiny model, corpora and job files."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent / "support"))

import fake_worker
from fake_worker import FakeWorkers


@pytest.fixture(scope="session", autouse=True)
def quick_step_times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines of tests measure their step times briefly, and keep them for the session only; so do Ray's workers, which
    get the environment but not the budget."""
    from actors import step_measurement

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(step_measurement, "BUDGET_S", 0.1)
        yield


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """An S3 server on loopback, as the environment variables that lead to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "hush-hush",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: dict[str, str]) -> Iterator[None]:
    """A local Ray for the whole session: starting one takes ten seconds. Its processes know the S3 server."""
    import ray
    from ray import cloudpickle

    from pipeline.graph import start_ray

    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_environment.items():
            environment.setenv(name, value)
        start_ray()
    cloudpickle.register_pickle_by_value(fake_worker)
    yield
    ray.shutdown()


@pytest.fixture
def fake_workers(tmp_path: Path) -> Callable[..., FakeWorkers]:
    def make(**settings: Any) -> FakeWorkers:
        return FakeWorkers(log=tmp_path / "asked.log", **settings)

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of some 60,000 weights; a token per printable ASCII character, after <s> and </s>."""
    import torch
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("small-model")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.2)
    model.save_pretrained(path)
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(code): code - fake_worker.FIRST_CHARACTER for code in range(32, 127)}}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes shard name -> prompts (or a table) as Parquet files into one folder."""

    def write(shards: dict[str, list[str | None] | pa.Table], folder: str = "in") -> Path:
        target = tmp_path / folder
        target.mkdir(exist_ok=True)
        for name, prompts in shards.items():
            table = prompts if isinstance(prompts, pa.Table) else prompts_table(prompts)
            pq.write_table(table, target / f"{name}.parquet")
        return target

    return write


def prompts_table(prompts: list[str | None]) -> pa.Table:
    return pa.table({"id": list(range(len(prompts))), "prompt": pa.array(prompts, pa.string())})


@pytest.fixture
def write_job(tmp_path: Path, small_model: Path) -> Callable[..., Path]:
    """Writes a job file over the folder `in`; sections given are laid over the defaults."""

    def write(name: str = "job.yaml", **sections: Any) -> Path:
        job = {
            "input": {"path": "in", "prompt_column": "prompt"},
            "model": str(small_model),
            "engine": {"device": "cpu", "dtype": "float32", "num_threads": 1, "page_size": 16, "num_pages": 256},
            "sampling": {"max_tokens": 8, "ignore_eos": True},
            "plan": {"max_rows_per_slice": 4},
            "output": {"path": "out"},
            "pricing": {"usd_per_device_hour": 1.0},
        }
        for section, values in sections.items():
            job[section] = {**job.get(section, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(job))
        return path

    return write


@pytest.fixture
def remove_output(tmp_path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(tmp_path / "out", ignore_errors=True)

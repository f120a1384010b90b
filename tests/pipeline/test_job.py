"""The job file: what is refused and how it is said, where places are, and what the fingerprint covers."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.job import (
    Job,
    JobError,
    diff_fingerprints,
    identify_model,
    job_from_dict,
    job_schema,
    load_job,
)
from pipeline.storage import Storage

MINIMAL = {"input": {"path": "data", "prompt_column": "text"}, "model": "m", "output": {"path": "out"}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", seed=0)


def write_model(folder: Path, seed: int, size: int = 64, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512, **config}))
    (folder / "tokenizer.json").write_text("{}")
    weights = np.random.default_rng(seed).standard_normal((size, 64)).astype(np.float32)
    save_file({"w": weights}, folder / "model.safetensors")
    return folder


def make_job(**changes) -> Job:
    data = {key: {**value} if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return job_from_dict(data)


def write_job(folder: Path, text: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(text)
    return str(folder / "job.yaml")


def refusal(**changes) -> str:
    with pytest.raises(JobError) as caught:
        make_job(**changes)
    return str(caught.value)


def test_relative_places_in_the_file_are_relative_to_the_file(tmp_path):
    path = write_job(
        tmp_path / "a",
        "input: {path: [data/*.parquet, s3://b/k], prompt_column: p}\nmodel: models/x\noutput: {path: ../out}\n"
        "engine: {tokenizer: tok}\n",
    )
    job = load_job(path)
    assert job.input.path == (f"{tmp_path}/a/data/*.parquet", "s3://b/k")
    assert (job.model, job.engine.tokenizer) == (f"{tmp_path}/a/models/x", f"{tmp_path}/a/tok")
    assert job.output.path == f"{tmp_path}/out"


def test_relative_places_in_an_override_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    path = write_job(tmp_path / "a", "input: {path: d, prompt_column: p}\nmodel: demo\noutput: {path: o}\n")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    job = load_job(path, ["output.path=o", "input.path=x", "model=m"])
    assert (job.output.path, job.input.path, job.model) == (
        f"{tmp_path}/b/o",
        f"{tmp_path}/b/x",
        f"{tmp_path}/b/m",
    )
    assert job.engine.model == job.model


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path):
    path = write_job(
        tmp_path,
        "input: {path: d, prompt_column: p}\nmodel: demo\noutput: {path: o}\nsampling: {n: 2, temperature: 1}\n",
    )
    job = load_job(
        path,
        [
            "sampling.stop=[a, b]",
            "sampling.temperature=5e-1",
            "pool={num_actors: [1, 3]}",
            "sampling.n=4",
            "sampling.n=3",
        ],
    )
    assert job.sampling.stop == ("a", "b")
    assert (job.sampling.temperature, job.sampling.n, job.pool.num_actors) == (0.5, 3, (1, 3))


def test_an_override_without_a_value_is_refused(tmp_path):
    path = write_job(tmp_path, "input: {path: d, prompt_column: p}\nmodel: demo\noutput: {path: o}\n")
    for override in ("sampling.n", "=3", "sampling.=3"):
        with pytest.raises(JobError, match=r"write key\.subkey=value"):
            load_job(path, [override])
    with pytest.raises(JobError, match="not valid YAML"):
        load_job(path, ["sampling.stop=[a"])


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    assert "input.promt_column: unknown key (value 'x'); did you mean prompt_column?" in refusal(
        input={"promt_column": "x"}
    )
    assert "engine.pagesize: unknown key (value 3); did you mean page_size?" in refusal(engine={"pagesize": 3})
    assert "known keys here: input, prompt, model" in refusal(zzzz=1)
    assert "resolved" not in refusal(zzzz=1)


def test_a_bad_value_is_named_with_its_key_and_what_is_allowed():
    assert "sampling.temperature: should be greater than or equal to 0, is -1" in refusal(sampling={"temperature": -1})
    assert "engine.dtype: should be 'auto', 'float32', 'bfloat16' or 'float16', is 'fp8'" in refusal(
        engine={"dtype": "fp8"}
    )
    actors = refusal(pool={"num_actors": "x"})
    assert "pool.num_actors: should be a valid integer" in actors and "is 'x'" in actors
    assert "num_actors=[3, 1]" in refusal(pool={"num_actors": [3, 1]})
    assert "min_tokens=9 is above max_tokens=3" in refusal(sampling={"min_tokens": 9, "max_tokens": 3})


def test_all_mistakes_are_told_at_once():
    message = refusal(sampling={"n": 0}, pool={"num_cpus": -1}, extra=1)
    assert all(key in message for key in ("sampling.n", "pool.num_cpus", "extra"))


def test_a_missing_section_is_named():
    with pytest.raises(JobError) as caught:
        job_from_dict({})
    message = str(caught.value)
    assert all(f"  {key}: missing" in message for key in ("input", "model", "output"))
    assert "engine" not in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input": {"messages_column": "m"}}, "both set"),
        ({"input": {"prompt_column": None}}, "exactly one of"),
        ({"prompt": {"template": "{{ a }}"}}, "exactly one of"),
        (
            {"input": {"prompt_column": None, "messages_column": "m"}, "prompt": {"chat_template": False}},
            "chat_template",
        ),
        ({"prompt": {"system": "be brief"}}, "prompt.system needs the chat template"),
        ({"input": {"prompt_column": None}, "prompt": {"template": "{{ a"}}, "not valid jinja2"),
        ({"input": {"prompt_column": None}, "prompt": {"template": "hello"}}, "names no column"),
        ({"limits": {"budget_usd": 3}, "pricing": {"usd_per_device_hour": 0}}, "can never be reached"),
        ({"input": {"path": []}}, "path is empty"),
        ({"resolved": {"model_identity": "x", "tokenizer_identity": "y"}}, "filled in by Shoal"),
        ({"model": "a", "engine": {"model": "b"}}, "differ; keep model only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, expected):
    assert expected in refusal(**changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("input: [", "not valid YAML"),
        ("- a\n- b\n", "settings are a mapping"),
        ("", "settings are a mapping"),
        ("model: a\nmodel: b\n", "'model' stands twice"),
        ("model: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_job_is_refused_with_its_name(tmp_path, text, expected):
    path = write_job(tmp_path, text)
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert expected in str(caught.value) and path in str(caught.value)


def test_a_job_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JobError, match=r"nope\.yaml: there is no such file"):
        load_job(str(tmp_path / "nope.yaml"))


def test_a_job_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        make_job().model = "other"  # type: ignore[misc]


def test_the_schema_accepts_what_the_job_accepts_and_refuses_unknown_keys():
    schema = job_schema()
    jsonschema.validate(MINIMAL, schema)
    jsonschema.validate({**MINIMAL, "engine": {"page_size": 16}, "pool": {"num_actors": [1, 2]}}, schema)
    for broken in ({**MINIMAL, "zzz": 1}, {"model": "m"}, {**MINIMAL, "sampling": {"n": 0}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)
    assert "resolved" not in schema["properties"]


def test_resolving_makes_places_absolute_identifies_the_model_and_changes_nothing_twice(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    job = make_job(model="model").resolve()
    assert job.model == job.engine.model == job.engine.tokenizer == str(model)
    assert job.input.path == (f"{model.parent}/data",) and job.output.path == f"{model.parent}/out"
    assert job.prompt.chat_template is False
    assert job.resolved is not None and job.resolved.max_model_len == 512
    assert job.resolve() == job
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_the_word_demo_stands_for_the_directory_that_resolve_is_given(model):
    assert make_job(model="demo").resolve({"demo": str(model)}).engine.model == str(model)
    with pytest.raises(JobError, match="'demo' is a word for a shipped model"):
        make_job(model="demo").resolve()


def test_the_draft_models_place_is_absolute_and_demo_stands_for_the_shipped_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_job(
        tmp_path / "a",
        f"input: {{path: d, prompt_column: p}}\nmodel: {model}\noutput: {{path: o}}\n"
        "engine: {speculative_config: {model: small, num_speculative_tokens: 8}}\n",
    )
    assert load_job(path).engine.speculative_config.model == f"{tmp_path}/a/small"
    job = load_job(path, ["engine.speculative_config.model=other"])
    assert job.engine.speculative_config.model == f"{tmp_path}/other"
    assert job.engine.speculative_config.num_speculative_tokens == 8
    by_program = make_job(model=str(model), engine={"speculative_config": {"model": "small"}}).resolve()
    assert by_program.engine.speculative_config.model == f"{tmp_path}/small"
    named = load_job(path, ["engine.speculative_config.model=demo"])
    assert named.resolve({"demo/draft": "/there"}).engine.speculative_config.model == "/there"
    with pytest.raises(JobError, match=r"engine\.speculative_config\.model: 'demo' is a word for a shipped model"):
        named.resolve({"demo": "/elsewhere"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"method": "eagle"},
            "method: should be 'auto', 'none', 'ngram', 'corpus', 'draft_model' or 'combined', is 'eagle'",
        ),
        ({"num_speculative_tokens": 65}, "num_speculative_tokens: should be less than or equal to 64, is 65"),
        ({"num_speculativ_tokens": 5}, "unknown key (value 5); did you mean num_speculative_tokens?"),
        ({"method": "draft_model"}, "no model is named; set speculative_config.model"),
        ({"method": "ngram", "model": "x"}, "uses no draft model"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min=5 is above prompt_lookup_max=4"),
    ],
)
def test_a_bad_setting_of_speculation_is_refused_with_what_is_allowed(config, expected):
    message = refusal(engine={"speculative_config": config})
    assert "engine.speculative_config" in message and expected in message


def test_a_model_that_is_not_there_is_refused_with_its_place_and_a_way_out(tmp_path):
    with pytest.raises(JobError, match=r"nowhere has no config\.json; give a Hugging Face model directory"):
        make_job(model=str(tmp_path / "nowhere")).resolve()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(JobError, match="not valid JSON"):
        make_job(model=str(tmp_path)).resolve()


def test_the_jobs_own_limit_goes_before_the_models(model, tmp_path):
    for engine, expected in (({"max_model_len": 100}, 100), ({}, 512)):
        resolved = make_job(model=str(model), engine=engine).resolve().resolved
        assert resolved is not None and resolved.max_model_len == expected
    (model / "config.json").write_text('{"model_type": "llama"}')
    resolved = make_job(model=str(model)).resolve().resolved
    assert resolved is not None and resolved.max_model_len is None


def test_the_fingerprint_is_the_same_in_another_place_with_other_limits_and_another_pool(model, tmp_path):
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    one = make_job(model=str(model)).resolve()
    other = make_job(
        model=str(moved),
        input={"path": "s3://b/other"},
        output={"path": "s3://b/out"},
        pool={"num_actors": 7},
        limits={"deadline_s": 5},
        pricing={"usd_per_device_hour": 3},
        plan={"slice_tokens": 100},
        engine={
            "page_size": 16,
            "max_num_seqs": 3,
            "enable_prefix_caching": False,
            "speculative_config": {"method": "combined", "model": "small", "num_speculative_tokens": 3},
        },
    ).resolve()
    assert one.fingerprint() == other.fingerprint()
    assert len(one.fingerprint()) == 64


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampling": {"seed": 1}}, "sampling.seed"),
        ({"sampling": {"temperature": 0.5}}, "sampling.temperature"),
        ({"engine": {"quantization": "int4"}}, "engine.quantization"),
        ({"engine": {"max_model_len": 100}}, "engine.max_model_len"),
        ({"input": {"prompt_column": "other"}}, "input.prompt_column"),
        ({"input": {"passthrough": "none"}}, "input.passthrough"),
        ({"prompt": {"chat_template": True}}, "prompt.chat_template"),
    ],
)
def test_whatever_changes_results_changes_the_fingerprint_and_is_named(model, changes, field):
    one, other = make_job(model=str(model)).resolve(), make_job(model=str(model), **changes).resolve()
    assert one.fingerprint() != other.fingerprint()
    (line,) = diff_fingerprints(one.fingerprint_fields(), other.fingerprint_fields())
    assert line.startswith(f"{field}: ") and " -> " in line


def test_a_deterministic_run_has_its_page_size_in_the_fingerprint(model):
    plain, one, other = (
        make_job(model=str(model), engine=engine).resolve().fingerprint_fields()
        for engine in ({"page_size": 16}, {"page_size": 16, "deterministic": True}, {"deterministic": True})
    )
    lines = diff_fingerprints(plain, one)
    assert [line.split(":")[0] for line in lines] == ["engine.deterministic", "engine.page_size"]
    assert diff_fingerprints(one, other) == ["engine.page_size: 16 -> 64"]


def test_saying_a_default_does_not_change_the_fingerprint(model):
    plain = make_job(model=str(model)).resolve()
    said = make_job(model=str(model), engine={"max_model_len": 512}, prompt={"chat_template": False}).resolve()
    assert plain.fingerprint() == said.fingerprint()


@pytest.mark.parametrize("size", [64, 65536])
def test_retrained_weights_of_the_same_shape_are_another_model(tmp_path, size):
    one = identify_model(str(write_model(tmp_path / "one", seed=1, size=size)))
    same = identify_model(str(write_model(tmp_path / "same", seed=1, size=size)))
    other = identify_model(str(write_model(tmp_path / "other", seed=2, size=size)))
    assert one == same != other


def test_a_model_in_a_store_is_the_same_model_as_its_local_copy(tmp_path):
    folder = write_model(tmp_path / "model", seed=3, size=65536)
    store = Storage("memory://models-in-a-store")
    for path in folder.iterdir():
        store.write_whole(path.name, path.read_bytes())
    local, remote = make_job(model=str(folder)).resolve(), make_job(model=store.uri).resolve()
    assert remote.fingerprint() == local.fingerprint() and remote.model == store.uri


def test_a_changed_configuration_or_tokenizer_is_another_fingerprint(model):
    before = make_job(model=str(model)).resolve()
    (model / "tokenizer.json").write_text('{"changed": 1}')
    between = make_job(model=str(model)).resolve()
    (model / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512, "rope_theta": 5}')
    after = make_job(model=str(model)).resolve()
    fields = [job.fingerprint_fields() for job in (before, between, after)]
    assert [line.split(":")[0] for line in diff_fingerprints(fields[0], fields[1])] == ["tokenizer"]
    assert [line.split(":")[0] for line in diff_fingerprints(fields[1], fields[2])] == ["model"]

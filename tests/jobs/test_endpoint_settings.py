"""The endpoint's settings and keys: what is wrong is said before anything is loaded."""

import hashlib

import pytest
import yaml

from jobs.endpoint.config import AccessSection, load_endpoint
from jobs.endpoint.keys import is_known, read_key_digests
from jobs.run import named_models
from pipeline.settings_file import JobError

KEYS = ["sk-one-of-the-keys-01", "sk-another-of-them-02"]
DIGESTS = tuple(hashlib.sha256(key.encode()).hexdigest() for key in KEYS)


def test_a_file_settings_and_overrides_are_laid_over_each_other(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"model": "models/m", "engine": {"page_size": 32}, "limits": {"max_queue": 3}}))
    config = load_endpoint(str(file), {"limits": {"max_choices": 5}}, ["engine.max_num_seqs=7", "port=9000"])
    assert config.model == config.engine.model == str(tmp_path / "models/m")
    assert (config.engine.page_size, config.engine.max_num_seqs, config.port) == (32, 7, 9000)
    assert (config.limits.max_queue, config.limits.max_choices, config.num_places) == (3, 5, 10)
    assert config.name == "m" and config.host == "127.0.0.1"


def test_the_shipped_model_goes_by_its_word():
    config = load_endpoint(None, {"model": "demo"}).resolve(named_models())
    assert config.name == "demo" and config.model == named_models()["demo"] == config.engine.tokenizer


def test_only_sampling_that_is_set_is_a_default():
    config = load_endpoint(None, {"model": "demo", "sampling": {"top_p": 0.9}})
    assert config.sampling_defaults == {"top_p": 0.9}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model: missing"),
        ({"model": "demo", "modle": 1}, "did you mean model"),
        ({"model": "demo", "replicas": {"min": 3}}, "min=3 is above max=1"),
        ({"model": "demo", "limits": {"max_choices": 1000}}, "max_choices=1000 would never find room"),
        ({"model": "demo", "prompt": {"template": "{{ x }}"}}, "are a job's"),
        ({"model": "demo", "engine": {"kv_cache": 1}}, "engine.kv_cache: unknown key"),
        ({"model": "demo", "port": 0}, "port"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(JobError, match=message):
        load_endpoint(None, settings)


def test_keys_come_from_a_file_and_a_variable_and_only_their_digests_stay(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# of the night shift\n{KEYS[0]}  # Iris\n\nsha256:{DIGESTS[1]}\n")
    monkeypatch.setenv("KEYS", f" {KEYS[1]},{KEYS[0]} ,")
    assert read_key_digests(AccessSection(api_key_file=str(file))) == DIGESTS
    assert read_key_digests(AccessSection(api_key_env="KEYS")) == DIGESTS[::-1]
    assert read_key_digests(AccessSection(api_key_file=str(file), api_key_env="KEYS")) == DIGESTS
    assert read_key_digests(AccessSection()) == ()
    assert all(is_known(key, DIGESTS) for key in KEYS)
    assert not any(is_known(key, DIGESTS) for key in ("", DIGESTS[0], KEYS[0].upper(), "\udcff"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("# none\n", "holds no key"), ("short", "at least 16"), ("sha256:abc", "64 hexadecimal digits")],
)
def test_a_file_without_good_keys_is_refused_and_not_repeated(tmp_path, text, message):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(JobError, match=message) as found:
        read_key_digests(AccessSection(api_key_file=str(file)))
    assert "short" not in str(found.value)


def test_a_key_file_or_variable_that_is_not_there_is_no_open_door(tmp_path, monkeypatch):
    monkeypatch.delenv("KEYS", raising=False)
    for access in (AccessSection(api_key_file=str(tmp_path / "none")), AccessSection(api_key_env="KEYS")):
        with pytest.raises(JobError):
            read_key_digests(access)

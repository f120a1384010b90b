"""Answers of a given form, as a job has them: in the job file, in rows of their own, and with the demo's model."""

from __future__ import annotations

import json

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.requests import SamplingParams
from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import INSTRUCTION, PROBLEMS, PRODUCTS, make_tickets
from jobs.run import run
from pipeline.job import JobError, job_schema, load_job

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["question", "answer"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "about": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "maxItems": 2},
    },
    "required": ["kind", "count", "about"],
    "additionalProperties": False,
}
TICKET = {
    "type": "object",
    "properties": {
        "product": {"enum": list(PRODUCTS)},
        "problem": {"enum": list(PROBLEMS)},
        "urgency": {"enum": ["low", "normal", "high"]},
        "order": {"type": ["string", "null"]},
    },
    "required": ["product", "problem", "urgency", "order"],
    "additionalProperties": False,
}


def structured(**constraint):
    return {"max_tokens": 160, "ignore_eos": False, "temperature": 0.9, "structured_outputs": constraint}


def test_every_answer_of_a_job_with_a_schema_is_valid_and_rows_may_have_their_own_form(
    ray_cluster, write_corpus, write_job, tmp_path
):
    backwards = {"properties": {"z": {"type": "null"}, "a": {"type": "null"}}, "required": ["z", "a"]}
    backwards |= {"type": "object", "additionalProperties": False}
    own = [
        None,
        {"structured_outputs": {"regex": "[0-9]{3}-[A-F]{2}"}},
        {"structured_outputs": {"json": backwards, "disable_any_whitespace": True}},
        {"structured_outputs": {"json": {"type": "nothing"}}},
        {"structured_outputs": {"choice": ["é"]}},
        {"structured_outputs": None},
    ]
    texts = [None if value is None else json.dumps(value) for value in own * 5]
    prompts = [f"row {i}: what is it?" for i in range(30)]
    write_corpus({"a": pa.table({"prompt": prompts, "sampling": pa.array(texts, pa.string())})})
    job = write_job(
        input={"sampling_column": "sampling"},
        sampling=structured(json=SCHEMA, disable_any_whitespace=True),
    )
    assert run(str(job), []) == 0
    rows = pq.read_table(tmp_path / "out" / "results" / "a.parquet").to_pylist()
    assert len(rows) == 30
    for i, row in enumerate(rows):
        if i % 6 in (3, 4):
            assert row["error"]["kind"] == "invalid_sampling"
            assert "structured_outputs" in row["error"]["message"]
        elif i % 6 == 0:
            assert row["finish_reason"] == "stop"
            jsonschema.validate(json.loads(row["response"]), SCHEMA)
        elif i % 6 == 1:
            assert row["response"][3] == "-" and row["response"][:3].isdecimal()
        elif i % 6 == 2:
            assert row["response"] == '{"z": null, "a": null}', "properties come in the schema's order"
        else:
            assert not row["response"].startswith('{"kind": '), "null takes the job's constraint away"


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"json": {"type": "nothing"}}, "sampling.structured_outputs: json cannot be followed: Invalid type: nothing"),
        ({"json": "{"}, "sampling.structured_outputs.json: the schema is not valid JSON"),
        ({"regx": "a"}, "sampling.structured_outputs.regx: unknown key (value 'a'); did you mean regex?"),
        ({}, "sampling.structured_outputs: set exactly one of json"),
    ],
)
def test_a_broken_constraint_in_a_job_file_is_told_when_it_is_read(constraint, message, write_job):
    with pytest.raises(JobError) as told:
        load_job(str(write_job(sampling=structured(**constraint))))
    assert message in str(told.value)


def test_another_constraint_is_another_fingerprint_and_another_way_to_write_it_is_not(write_job, write_corpus):
    write_corpus({"a": ["one"]})

    def fingerprint(constraint):
        return load_job(str(write_job(sampling=structured(**constraint)))).resolve().fingerprint()

    one = fingerprint({"json": json.dumps(SCHEMA)})
    assert fingerprint({"json": json.dumps(SCHEMA, indent=2)}) == one
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    assert fingerprint({"json": json.dumps(turned)}) != one
    assert fingerprint({"json_object": True}) != one


def test_the_schema_of_the_job_file_knows_the_constraints():
    jsonschema.validate(
        {"json": SCHEMA}, {**job_schema()["$defs"]["StructuredOutputs"], "$defs": job_schema()["$defs"]}
    )


def test_the_demos_answers_are_the_same_with_its_schema_where_they_fit_it_and_fit_it_where_they_did_not():
    config = EngineConfig(
        model=str(JOB_FILE.parent / "model"),
        dtype="float32",
        num_threads=1,
        num_pages=512,
        speculative_config=SpeculativeConfig(method="combined"),
    )
    engine = Engine(config)
    prompts = [
        engine.tokenizer.encode(f"<|system|>{INSTRUCTION}<|end|><|user|>{ticket.text}<|end|><|assistant|>")
        for ticket in make_tickets(48, 90_211)
    ]
    free = engine.generate(prompts, SamplingParams(max_tokens=64))
    bound = engine.generate(prompts, SamplingParams(max_tokens=64, structured_outputs={"json": TICKET}))
    num_same = 0
    for one, other in zip(free, bound):
        jsonschema.validate(json.loads(other.outputs[0].text), TICKET)
        if fits(one.outputs[0].text):
            assert other.outputs[0].text == one.outputs[0].text
            num_same += 1
    assert num_same >= 40
    in_one_line = {"json": TICKET, "disable_any_whitespace": True}
    for one, other in zip(
        bound, engine.generate(prompts, SamplingParams(max_tokens=64, structured_outputs=in_one_line))
    ):
        text = one.outputs[0].text
        assert text != json.dumps(json.loads(text), ensure_ascii=False) or other.outputs[0].text == text
    assert sum(c.usage.drafted_tokens for c in bound) > 0
    # Where the model would rather say something else, it does not.
    nothing = [engine.tokenizer.encode("<|user|>Tell me a story about a fish.<|end|><|assistant|>")] * 2
    told = engine.generate(nothing, SamplingParams(max_tokens=90, structured_outputs={"json": TICKET}, temperature=1.0))
    for completion in told:
        assert completion.outputs[0].finish_reason == "length" or fits(completion.outputs[0].text)


def fits(text):
    try:
        jsonschema.validate(json.loads(text), TICKET)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True

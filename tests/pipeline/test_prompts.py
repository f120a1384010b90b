"""Prompts: what the model reads for each kind of row, and that a bad row is an error and never an exception."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.job import Job, JobError, job_from_dict
from pipeline.prompts import RenderedRow, Renderer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.index0 == 0 %}{{ raise_exception('assistant speaks first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ tail | default('') }}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = chat_template
    return tokenizer


TOKENIZER = make_tokenizer()


def make_job(**sections) -> Job:
    data = {"input": {"path": "d"}, "model": "m", "output": {"path": "o"}, **sections}
    data["input"] = {"path": "d", **sections.get("input", {})}
    if not {"prompt_column", "messages_column"} & data["input"].keys() and "template" not in data.get("prompt", {}):
        data["input"]["prompt_column"] = "prompt"
    return job_from_dict(data)


def render(columns: dict, tokenizer=TOKENIZER, **sections) -> list[RenderedRow]:
    batch = pa.RecordBatch.from_pydict(columns)
    return Renderer(make_job(**sections), tokenizer).render(batch)


def text_of(row: RenderedRow) -> str:
    assert row.error is None, row.error
    return TOKENIZER.decode(row.token_ids)


def kinds(rows: list[RenderedRow]) -> list[str | None]:
    return [row.error.kind if row.error else None for row in rows]


def test_a_prompt_column_is_tokenised_as_it_is_with_the_tokenizers_bos():
    rows = render({"prompt": ["Hello", "Grüße 你好 🐟"]})
    assert [text_of(row) for row in rows] == ["<s>Hello", "<s>Grüße 你好 🐟"]
    assert rows[0].token_ids == TOKENIZER("Hello")["input_ids"]


def test_a_batch_tokenises_as_each_row_alone():
    texts = ["a", "bb", "", "ccc", None, "dddd"]
    together = render({"prompt": texts})
    alone = [render({"prompt": pa.array([text], pa.string())})[0] for text in texts]
    assert together == alone


def test_null_and_empty_prompts_are_error_rows_and_the_others_are_answered():
    rows = render({"prompt": ["a", None, "", "b"]})
    assert kinds(rows) == [None, "null_prompt", "empty_prompt", None]
    assert rows[1].token_ids == [] and rows[1].error is not None and rows[1].error.message == "the prompt is null"


def test_a_column_of_nothing_but_nulls_is_all_error_rows():
    assert kinds(render({"prompt": pa.nulls(3)})) == ["null_prompt"] * 3


def test_a_prompt_that_is_no_text_is_an_error_row():
    (row,) = render({"prompt": [3]})
    assert row.error is not None and (row.error.kind, row.error.message) == (
        "wrong_type",
        "the prompt is of type int, should be text",
    )


def test_bytes_are_read_as_utf8_and_undecodable_text_is_an_error_row():
    column = pa.array([b"good", b"bad \xff", "größer".encode()], pa.binary())
    for typed in (column, column.view(pa.string()), column.cast(pa.large_binary())):
        rows = render({"prompt": typed})
        assert kinds(rows) == [None, "invalid_text", None]
        assert rows[1].error is not None and "at byte 4" in rows[1].error.message
        assert text_of(rows[2]) == "<s>größer"


def test_half_a_surrogate_pair_is_an_error_row():
    rows = render({"m": ['[{"role": "user", "content": "a\\ud800"}]']}, input={"messages_column": "m"})
    assert kinds(rows) == ["invalid_text"]
    rows = render({"m": ['[{"role": "a\\ud800", "content": "a"}]']}, input={"messages_column": "m"})
    assert rows[0].error is not None and rows[0].error.kind == "invalid_messages"
    rows[0].error.message.encode()


def test_a_prompt_longer_than_the_model_is_an_error_row_with_both_lengths():
    rows = render({"prompt": ["x" * 8, "x" * 9]}, engine={"max_model_len": 10})
    assert kinds(rows) == [None, "prompt_too_long"]  # with BOS 9 and 10 tokens, and one to answer
    assert rows[1].error is not None
    assert "10 tokens" in rows[1].error.message and "max_model_len=10" in rows[1].error.message


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    assert [text_of(row) for row in render({"prompt": ["<s>Hello", "<s><s>x"]})] == ["<s>Hello", "<s><s>x"]


def test_the_chat_template_wraps_a_prompt_and_bos_stands_once():
    (row,) = render({"prompt": ["Hi"]}, prompt={"chat_template": True, "system": "Be brief."})
    assert text_of(row) == "<s>[system]Be brief.[user]Hi[assistant]"
    (row,) = render({"prompt": ["Hi"]}, prompt={"chat_template": True, "add_generation_prompt": False})
    assert text_of(row) == "<s>[user]Hi"
    (row,) = render({"prompt": ["Hi"]}, prompt={"chat_template": True, "chat_template_kwargs": {"tail": "!"}})
    assert text_of(row) == "<s>[user]Hi[assistant]!"


def test_a_tokenizer_without_a_chat_template_is_the_jobs_mistake():
    with pytest.raises(JobError, match="has no chat template"):
        Renderer(make_job(prompt={"chat_template": True}), make_tokenizer(None))


def test_messages_may_be_structs_or_json_text_with_texts_or_text_parts():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    structs = render({"m": [messages]}, input={"messages_column": "m"})
    texts = render({"m": [json.dumps(messages), json.dumps(parts)]}, input={"messages_column": "m"})
    part_structs = render({"m": [parts]}, input={"messages_column": "m"})
    assert text_of(structs[0]) == text_of(texts[0]) == "<s>[user]Hi[assistant]Ho[assistant]"
    assert text_of(part_structs[0]) == text_of(texts[1]) == "<s>[user]a\nb[assistant]"


def test_a_system_prompt_of_the_job_stands_back_behind_the_rows_own():
    own = [{"role": "system", "content": "Row."}, {"role": "user", "content": "Hi"}]
    rows = render({"m": [own, own[1:]]}, input={"messages_column": "m"}, prompt={"system": "Job."})
    assert [text_of(row) for row in rows] == [
        "<s>[system]Row.[user]Hi[assistant]",
        "<s>[system]Job.[user]Hi[assistant]",
    ]


@pytest.mark.parametrize(
    ("messages", "kind", "part"),
    [
        (None, "null_prompt", "null"),
        ("", "empty_prompt", "empty"),
        ("[]", "empty_prompt", "empty list"),
        ('[{"role": "user", "content": ""}]', "empty_prompt", "all messages are empty"),
        ("[", "invalid_messages", "not valid JSON"),
        ("[" * 100_000, "invalid_messages", "not valid JSON"),
        ("null", "invalid_messages", "NoneType"),
        ('{"role": "user", "content": "x"}', "invalid_messages", "should be a list"),
        ('["x"]', "invalid_messages", "message 0 is of type str"),
        ('[{"content": "x"}]', "invalid_messages", "role None"),
        ('[{"role": ["user"], "content": "x"}]', "invalid_messages", "role ['user']"),
        ('[{"role": "wizard", "content": "x"}]', "invalid_messages", "role 'wizard'"),
        ('[{"role": "user"}]', "invalid_messages", "message 0 has no content"),
        ('[{"role": "user", "content": 3}]', "invalid_messages", "type int"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "invalid_messages", "only text is read"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "invalid_messages", "part 0 of message 0"),
        ('[{"role": "assistant", "content": "x"}]', "template_error", "assistant speaks first"),
    ],
)
def test_bad_messages_are_error_rows_that_say_what_is_wrong(messages, kind, part):
    good = '[{"role": "user", "content": "x"}]'
    rows = render({"m": [good, messages, good]}, input={"messages_column": "m"})
    assert kinds(rows) == [None, kind, None]
    assert rows[1].error is not None and part in rows[1].error.message


def test_a_template_fills_in_the_named_columns():
    columns = {"name": ["Ada", "Bo"], "age": [36, 5], "unused": ["x", "y"]}
    rows = render(columns, prompt={"template": "{{ name }} is {{ age }}{% if age > 20 %}!{% endif %}\n"})
    assert [text_of(row) for row in rows] == ["<s>Ada is 36!\n", "<s>Bo is 5\n"]
    rows = render(columns, prompt={"template": "{{ name }}", "chat_template": True})
    assert text_of(rows[0]) == "<s>[user]Ada[assistant]"


def test_a_template_that_fails_on_a_row_makes_an_error_row():
    columns = {"a": [1, 0, None, 1], "b": [b"x", b"y", b"z", b"\xff"]}
    rows = render(columns, prompt={"template": "{{ 1 / a }} {{ b }}"})
    assert kinds(rows) == [None, "template_error", "template_error", "invalid_text"]
    assert rows[1].error is not None and "ZeroDivisionError" in rows[1].error.message


def test_a_null_is_never_written_as_the_word_none():
    rows = render({"a": ["x", None]}, prompt={"template": "Say {{ a }}"})
    assert kinds(rows) == [None, "null_prompt"]
    rows = render({"a": ["x", None]}, prompt={"template": "Say {% if a is none %}nothing{% else %}{{ a }}{% endif %}"})
    assert [text_of(row) for row in rows] == ["<s>Say x", "<s>Say nothing"]


def test_a_template_cannot_reach_out_of_its_sandbox():
    rows = render({"a": ["x"]}, prompt={"template": "{{ a.__class__.__mro__ }}"})
    assert kinds(rows) == ["template_error"]
    rows = render({"a": [[1]]}, prompt={"template": "{{ a.append(2) }}"})
    assert kinds(rows) == ["template_error"]


def test_a_rows_own_sampling_is_laid_over_the_jobs():
    columns = {"prompt": ["a"] * 4, "s": ['{"temperature": 1, "stop": "x"}', None, "", "{}"]}
    rows = render(columns, input={"prompt_column": "prompt", "sampling_column": "s"}, sampling={"max_tokens": 7})
    assert (rows[0].sampling.temperature, rows[0].sampling.stop, rows[0].sampling.max_tokens) == (1.0, ("x",), 7)
    assert rows[0].overrides == '{"stop": "x", "temperature": 1}'
    assert [row.overrides for row in rows[1:]] == [None] * 3
    assert all(row.sampling.max_tokens == 7 and row.sampling.temperature == 0 for row in rows[1:])


def test_in_a_struct_null_means_not_set():
    own = [{"temperature": 0.5, "seed": None}, {"temperature": None, "seed": 3}, None]
    rows = render(
        {"prompt": ["a"] * 3, "s": own},
        input={"prompt_column": "prompt", "sampling_column": "s"},
        sampling={"temperature": 1.0, "seed": 9},
    )
    assert [(row.sampling.temperature, row.sampling.seed) for row in rows] == [(0.5, 9), (1.0, 3), (1.0, 9)]


@pytest.mark.parametrize(
    ("own", "part"),
    [
        ("{", "not valid JSON"),
        ("[1]", "should be a mapping"),
        ('{"temperatur": 1}', "did you mean temperature?"),
        ('{"temperature": -1}', "temperature: should be greater than or equal to 0, is -1"),
        ('{"max_tokens": 0}', "max_tokens"),
        ('{"temperature": NaN}', "cannot be written as JSON"),
        ('{"seed": 99999999999999999999}', "seed"),
        ('{"n": 2}', "the job's sampling.n is 1"),
        ('{"logprobs": 2}', "the job's sampling.logprobs is not set"),
        ('{"min_tokens": 500}', "min_tokens=500 is above max_tokens=256"),
    ],
)
def test_a_bad_override_is_an_error_row_that_says_what_is_wrong(own, part):
    rows = render({"prompt": ["a", "b"], "s": [own, None]}, input={"prompt_column": "prompt", "sampling_column": "s"})
    assert kinds(rows) == ["invalid_sampling", None]
    assert rows[0].error is not None and part in rows[0].error.message


def test_ids_are_texts_or_integers():
    for column, expected in (
        (pa.array(["x", None]), ["x", None]),
        (pa.array([3, 2**62]), [3, 2**62]),
        (pa.array([b"\xff\x00", b"ab"], pa.binary(2)), ["ff00", "6162"]),
    ):
        rows = render({"prompt": ["a", "b"], "i": column}, input={"prompt_column": "prompt", "id_column": "i"})
        assert [row.id for row in rows] == expected


def test_messages_of_errors_stay_short():
    (row,) = render({"m": [json.dumps([{"role": "x" * 10_000, "content": "x"}])]}, input={"messages_column": "m"})
    assert row.error is not None and len(row.error.message) <= 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "n", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(JSON, JSON, st.binary(max_size=8)), min_size=1, max_size=8))
def test_whatever_a_row_holds_it_becomes_tokens_or_an_error_of_a_known_kind(rows):
    columns = {
        "m": pa.array([json.dumps(messages).encode() for messages, _, _ in rows], pa.binary()).view(pa.string()),
        "s": pa.array([json.dumps(sampling).encode() for _, sampling, _ in rows], pa.binary()).view(pa.string()),
        "p": pa.array([data for _, _, data in rows], pa.binary()).view(pa.string()),
    }
    known = {None, "null_prompt", "empty_prompt", "invalid_messages", "template_error", "invalid_text"}
    for section in ({"messages_column": "m"}, {"prompt_column": "p"}):
        rendered = render(columns, input={**section, "sampling_column": "s"})
        assert len(rendered) == len(rows)
        assert set(kinds(rendered)) <= known | {"invalid_sampling"}
        assert all(bool(row.token_ids) == (row.error is None) for row in rendered)

"""Structured output: what a constraint allows, in masks, drafts and whole answers of random models."""

import json
import re
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from pydantic import TypeAdapter, ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import actors.drafters.grammar
from actors.config import EngineConfig, SpeculativeConfig
from actors.drafters.acceptance import Acceptance
from actors.drafters.drafting import Speculator, make_speculator
from actors.drafters.grammar import MAX_COMPILED, GrammarDrafter, Grammars, ban, read_tokenizer
from actors.engine import Engine
from actors.requests import Request, SamplingParams
from actors.sequence import Sequence
from actors.structured_outputs import MAX_GRAMMAR_BYTES, StructuredOutputs

VOCAB, EOS = 97, 1
TICKET = {
    "type": "object",
    "properties": {
        "product_category": {"enum": ["laptop", "phone", "tablet"]},
        "number": {"type": ["integer", "null"], "minimum": 0, "maximum": 999},
        "comment": {"type": "string", "maxLength": 12, "pattern": "^[a-z ]*$"},
    },
    "required": ["product_category", "number", "comment"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "schema": {"json": TICKET, "disable_any_whitespace": True},
    "schema with whitespace": {"json": TICKET},
    "regex": {"regex": r"(ab|a|b{2,4})-[0-9]{3}(\.[0-9]+)?"},
    "choice": {"choice": ["yes", "yesterday", "no", "none of it"]},
    "grammar": {"grammar": 'start: item ("," item)*\nitem: "key" "=" /[a-f]{1,3}/'},
    "any object": {"json_object": True},
}


@pytest.fixture(scope="module")
def characters(tiny_llama):
    """The tokenizer of one token per ASCII character."""
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def words():
    """A byte-level tokenizer with tokens of several characters, such as start strings of JSON."""
    from jobs.demo.main import JOB_FILE

    return AutoTokenizer.from_pretrained(JOB_FILE.parent / "model")


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make(**fields):
        defaults = {"dtype": "float32", "page_size": 8, "num_threads": 1, "num_pages": 512, "max_num_seqs": 16}
        speculation = SpeculativeConfig(method=fields.pop("method", "none"))
        return Engine(EngineConfig(model=str(tiny_llama), speculative_config=speculation, **{**defaults, **fields}))

    return make


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


def constrained(max_tokens=150, **fields):
    """Sampling parameters; the fields of a constraint are picked out."""
    names = {"json", "json_object", "regex", "choice", "grammar", "disable_any_whitespace"}
    constraint = {name: fields.pop(name) for name in names & fields.keys()}
    return SamplingParams(max_tokens=max_tokens, structured_outputs=constraint, **fields)


def bits_of(words_W, vocab_size=VOCAB):
    return set(np.flatnonzero(np.unpackbits(words_W.view(np.uint8), count=vocab_size, bitorder="little")).tolist())


def masks(matcher, draft=()):
    words_PW = np.empty((1 + len(draft), matcher.num_words), np.int32)
    matcher.fill_masks(list(draft), words_PW)
    return words_PW


def answers(completions):
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [(o.token_ids, o.text, o.finish_reason) for completion in completions for o in completion.outputs]


def answer_all(engine, requests):
    """Completions by request id."""
    for request in requests:
        engine.add(request)
    done = {}
    while engine.has_unfinished():
        done.update({completion.request_id: completion for completion in engine.step()})
    return done


PROMPTS = [[5, 9, 33, 70], [8, 8, 21], [5, 9, 33, 71, 12, 40, 2], [60] * 9]


def test_a_mask_holds_what_goes_on_to_a_choice_and_the_end_exactly_where_one_is_whole(characters):
    texts = CONSTRAINTS["choice"]["choice"]
    grammars = Grammars(characters, VOCAB, [EOS])
    for prefix in {text[:length] for text in texts for length in range(len(text) + 1)}:
        matcher = grammars.new_matcher(StructuredOutputs(choice=texts))
        for token in characters.encode(prefix):
            matcher.append(token)
        longer = {text[len(prefix)] for text in texts if text.startswith(prefix) and text != prefix}
        assert matcher.is_done == (not longer)
        ends = {EOS} if prefix in texts else set()
        assert bits_of(masks(matcher)[0]) == {*characters.convert_tokens_to_ids(sorted(longer)), *ends}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("tokenizer", ["characters", "words"])
def test_a_mask_depends_on_the_tokens_before_it_and_not_on_drafts_or_questions(name, tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    grammars = Grammars(tokenizer, len(tokenizer), [EOS])
    constraint = TypeAdapter(StructuredOutputs).validate_python(CONSTRAINTS[name])
    rng = np.random.default_rng(3)
    for _ in range(6):
        matcher, tokens, seen = grammars.new_matcher(constraint), [], []
        while len(tokens) < 40 and not matcher.is_done:
            seen.append(masks(matcher)[0])
            forced = matcher.forced([], 1)
            assert not forced or bits_of(seen[-1], len(tokenizer)) == set(forced)
            allowed = sorted(bits_of(seen[-1], len(tokenizer)) - {EOS})
            if not allowed:
                break
            tokens.append(int(rng.choice(allowed)))
            matcher.append(tokens[-1])
            assert not matcher.error
        other = Grammars(tokenizer, len(tokenizer), [EOS]).new_matcher(constraint)
        num_known = 0
        while num_known < len(tokens):
            draft = tokens[num_known : num_known + rng.integers(0, 6)]
            nonsense = [int(token) for token in rng.integers(0, len(tokenizer), 2)]
            assert other.count_allowed([*draft, *nonsense]) >= len(draft)
            for p, words_W in enumerate(masks(other, draft)):
                if num_known + p < len(seen):
                    assert (words_W == seen[num_known + p]).all()
            other.forced(draft, 9)
            for token in tokens[num_known : num_known + len(draft) + 1]:
                other.append(token)
            num_known += len(draft) + 1
        assert (other.is_done, other.error) == (matcher.is_done, "")


def test_greedy_answers_are_the_argmax_over_what_a_choice_allows(engine, tiny_llama, model_zoo, characters):
    model = model_zoo.reference(tiny_llama)
    texts = ["abcd", "abxy", "b12", "b1", "zzzzzzzz", "Qq"]

    @torch.no_grad()
    def expected(prompt):
        text = ""
        while True:
            logits = model(torch.tensor([prompt + characters.encode(text)])).logits[0, -1]
            more = {t[len(text)] for t in texts if t.startswith(text) and t != text}
            allowed = [*characters.convert_tokens_to_ids(sorted(more)), *([EOS] if text in texts else [])]
            best = max(allowed, key=lambda token: float(logits[token]))
            text += "" if best == EOS else characters.decode([best])
            if best == EOS or not any(t.startswith(text) and t != text for t in texts):
                return text

    rng = np.random.default_rng(0)
    prompts = [[int(token) for token in rng.integers(2, VOCAB, 6)] for _ in range(40)]
    completions = engine.generate(prompts, constrained(choice=texts, temperature=0))
    found = [text for _, text, _ in answers(completions)]
    assert found == [expected(prompt) for prompt in prompts]
    assert len(set(found)) >= 3


SAMPLING = {
    "greedy": {"temperature": 0},
    "several with noise": {"temperature": 0.9, "n": 3, "top_p": 0.95},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_k": 9},
    "stop strings and few tokens": {"temperature": 1.0, "stop": ["la", "7"], "max_tokens": 60, "logprobs": 2},
    "min_tokens": {"temperature": 0.8, "min_tokens": 30},
}


@pytest.mark.parametrize("method", ["auto", "combined"])
@pytest.mark.parametrize("how", SAMPLING)
def test_speculation_changes_no_answer(how, method, make_engine, engine):
    speculating = make_engine(method=method)
    for constraint in CONSTRAINTS.values():
        sampling = constrained(**{"max_tokens": 80, **constraint, **SAMPLING[how]})
        assert answers(speculating.generate(PROMPTS, sampling)) == answers(engine.generate(PROMPTS, sampling))
    assert sum(drafter.accepted_tokens for drafter in speculating.drafter_stats() if drafter.name == "grammar") > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"num_pages": 24, "method": "combined"},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 9, "method": "combined"},
        {"enable_prefix_caching": False},
    ],
)
def test_batches_preemption_and_caches_change_no_answer(fields, make_engine, engine):
    prompts, sampling = PROMPTS * 3, constrained(**CONSTRAINTS["schema"], temperature=0.9)
    other = make_engine(**fields)
    completions = other.generate(prompts, sampling)
    assert answers(completions) == answers(engine.generate(prompts, sampling))
    if "num_pages" in fields:
        assert sum(completion.usage.num_preemptions for completion in completions) > 0
    assert other.scheduler.tree.num_available == other.scheduler.pool.num_pages


def test_a_deterministic_engine_gives_the_same_bits_alone_and_together(make_engine):
    engine = make_engine(deterministic=True, method="combined")
    sampling = constrained(**CONSTRAINTS["schema"], temperature=0.9)
    together = engine.generate(PROMPTS, sampling)
    alone = make_engine(deterministic=True).generate(PROMPTS[:1], sampling)
    assert answers(alone) == answers(together[:1])
    assert alone[0].outputs[0].mean_logprob.hex() == together[0].outputs[0].mean_logprob.hex()


def test_rows_with_and_without_a_constraint_share_steps(engine):
    plain = SamplingParams(max_tokens=30, temperature=0.8, ignore_eos=True)
    kinds = [plain, constrained(**CONSTRAINTS["regex"], temperature=0.8), plain, constrained(**CONSTRAINTS["choice"])]
    requests = [Request(f"mixed-{i}", prompt, kinds[i], seed=i) for i, prompt in enumerate(PROMPTS)]
    mixed = answer_all(engine, requests)
    for request in requests:
        alone = answer_all(engine, [request])
        assert answers(alone.values()) == answers([mixed[request.request_id]])
    assert re.fullmatch(CONSTRAINTS["regex"]["regex"], mixed["mixed-1"].outputs[0].text)
    assert mixed["mixed-3"].outputs[0].text in CONSTRAINTS["choice"]["choice"]


DEEPER = ("array", "object", "anyOf")


@st.composite
def schemas(draw, depth=2):
    """Objects, arrays and plain values of which every answer is short."""
    kind = draw(st.sampled_from(["enum", "integer", "boolean", "null", "string", "number", *(DEEPER if depth else ())]))
    names = st.text('abcxyz _-"\\', min_size=1, max_size=5)
    if kind == "enum":
        values = st.one_of(names, st.integers(-99, 99), st.booleans(), st.none())
        return {"enum": draw(st.lists(values, min_size=1, max_size=4))}
    if kind == "integer":
        low = draw(st.integers(-50, 50))
        return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 90))}
    if kind == "number":
        return {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20}
    if kind == "string":
        return draw(
            st.sampled_from(
                [
                    {"type": "string", "maxLength": 4},
                    {"type": "string", "pattern": "^[A-F]{2,3}[0-9]?$"},
                    {"type": "string", "format": "date"},
                    {"const": "a fixed text"},
                ]
            )
        )
    if kind == "array":
        return {"type": "array", "items": draw(schemas(depth=depth - 1)), "maxItems": draw(st.integers(0, 3))}
    if kind == "anyOf":
        return {"anyOf": draw(st.lists(schemas(depth=depth - 1), min_size=1, max_size=3))}
    if kind == "object":
        properties = draw(st.dictionaries(names, schemas(depth=depth - 1), min_size=1, max_size=3))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 2**40), compact=st.booleans())
def test_every_finished_answer_of_a_random_model_is_valid(engine, schema, seed, compact):
    fields = {"json": schema, "disable_any_whitespace": compact, "temperature": 1.0, "seed": seed, "max_tokens": 240}
    for tokens, text, finish_reason in answers(engine.generate(PROMPTS, constrained(**fields))):
        assert finish_reason == "stop" or len(tokens) == 240
        assert not compact or finish_reason == "stop"
        if finish_reason == "stop":
            jsonschema.validate(json.loads(text), schema)
        assert not compact or text == json.dumps(json.loads(text), ensure_ascii=False) or "." in text or "\\" in text


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_answers_have_the_form_that_was_asked_for(name, engine):
    prompts = PROMPTS * 4
    finished = [
        text
        for _, text, reason in answers(engine.generate(prompts, constrained(**CONSTRAINTS[name], temperature=1.0)))
        if reason == "stop"
    ]
    assert len(finished) >= (1 if name == "any object" else 4)
    for text in finished:
        if "json" in CONSTRAINTS[name]:
            answer = json.loads(text)
            jsonschema.validate(answer, TICKET)
            assert list(answer) == list(TICKET["properties"])
        elif name == "any object":
            assert isinstance(json.loads(text), dict)
        elif name == "choice":
            assert text in CONSTRAINTS[name]["choice"]
        else:
            pattern = {"grammar": r"key=[a-f]{1,3}(,key=[a-f]{1,3})*"}.get(name) or CONSTRAINTS[name]["regex"]
            assert re.fullmatch(pattern, text)


def test_an_answer_ends_with_its_form_and_without_a_token_for_the_end(engine, characters):
    sampling = constrained(regex="[0-9]{5}", min_tokens=20, ignore_eos=True)
    for tokens, text, reason in answers(engine.generate(PROMPTS, sampling)):
        assert (len(tokens), reason) == (5, "stop")
        assert characters.decode(tokens) == text


def test_min_tokens_keeps_an_answer_from_ending_where_it_may_go_on(engine):
    early = answers(engine.generate(PROMPTS, constrained(regex="a{1,12}", temperature=1.0)))
    late = answers(engine.generate(PROMPTS, constrained(regex="a{1,12}", temperature=1.0, min_tokens=9)))
    assert min(len(text) for _, text, _ in early) < 9
    assert all(9 <= len(text) <= 12 for _, text, _ in late)


def test_max_tokens_cuts_an_answer_and_says_so(engine):
    cut = answers(engine.generate(PROMPTS, constrained(regex="[a-z]{40}", max_tokens=7)))
    assert [(len(text), reason) for _, text, reason in cut] == [(7, "length")] * len(PROMPTS)


def test_a_ban_that_would_leave_nothing_is_no_ban():
    words_W = np.array([1 << 3, -(2**31)], np.int32)
    ban(words_W, [3, 63])
    assert bits_of(words_W, 64) == {3, 63}
    ban(words_W, [63, 5])
    assert bits_of(words_W, 64) == {3}


def test_forced_tokens_save_steps(make_engine, engine):
    sampling = constrained(**CONSTRAINTS["schema"])
    speculating = make_engine(method="combined")
    before = engine.stats.num_steps
    assert answers(speculating.generate(PROMPTS, sampling)) == answers(engine.generate(PROMPTS, sampling))
    assert speculating.stats.num_steps < 0.6 * (engine.stats.num_steps - before)
    (grammar,) = (drafter for drafter in speculating.drafter_stats() if drafter.name == "grammar")
    assert grammar.accepted_tokens > 40


def test_what_is_forced_is_drafted_while_guesses_do_not_pay(make_engine, engine):
    sampling = constrained(**CONSTRAINTS["schema"], temperature=0.9)
    speculating = make_engine(method="auto")
    speculating.speculation._pause_left = 10_000
    assert answers(speculating.generate(PROMPTS, sampling)) == answers(engine.generate(PROMPTS, sampling))
    stats = {drafter.name: drafter for drafter in speculating.drafter_stats()}
    assert stats["grammar"].drafted_tokens == stats["grammar"].accepted_tokens > 40
    assert stats["ngram"].drafted_tokens == stats["corpus"].drafted_tokens == 0
    assert 9_000 < speculating.speculation._pause_left < 10_000


class Parrot:
    """Drafts the same tokens for everybody."""

    name = "ngram"

    def __init__(self, acceptance, tokens):
        self.tokens, self.cell = tokens, acceptance.add_cells([0.9])

    def propose(self, sequences, drafts, limits):
        for draft, limit in zip(drafts, limits):
            tokens = self.tokens[: limit - len(draft.token_ids)]
            draft.token_ids += tokens
            draft.cells += [self.cell] * len(tokens)
            draft.chances += [0.9] * len(tokens)

    def finish(self, sequence):
        pass


def test_a_draft_ends_where_the_constraint_forbids_it_and_goes_on_with_what_is_forced(characters):
    acceptance = Acceptance()
    guesses = characters.encode("12kg")
    speculator = Speculator([GrammarDrafter(acceptance), Parrot(acceptance, guesses)], acceptance)
    sampling = constrained(regex="weight: [0-9]{2} pounds|.*%.*")
    free = Sequence(Request("free", [5], SamplingParams()), 0, 100)
    matcher = Grammars(characters, VOCAB, [EOS]).new_matcher(StructuredOutputs(regex="weight: [0-9]{2} pounds"))
    sequence = Sequence(Request("row", [5], sampling), 0, 100, matcher=matcher)
    draft, plain = speculator.propose([sequence, free], [30, 30])
    assert characters.decode(draft.token_ids) == "weight: 12 pounds"
    assert [speculator.drafters[source].name[0] for source in draft.sources] == [*"gggggggg", *"nn", *"ggggggg"]
    assert plain.token_ids[:4] == guesses
    assert bits_of(masks(matcher)[0]) == {*characters.encode("w")}, "drafting leaves the matcher where it was"
    (short,) = speculator.propose([sequence], [3])
    assert characters.decode(short.token_ids) == "wei"


def test_every_method_but_none_drafts_what_is_forced():
    for method in ("auto", "ngram", "corpus", "combined"):
        assert make_speculator(SpeculativeConfig(method=method)).drafters[0].name == "grammar"
    assert make_speculator(SpeculativeConfig(method="none")).drafters == []


def test_what_the_tokenizer_cannot_write_is_an_error_of_that_row_alone(engine):
    bad = [constrained(choice=["aé"]), constrained(choice=["日本"])]
    good = constrained(choice=["ae", "be"])
    requests = [Request("good", [5, 6], good), *(Request(f"bad{i}", [5, 6], s) for i, s in enumerate(bad))]
    done = answer_all(engine, requests)
    assert done["good"].outputs[0].text in ("ae", "be")
    for name in ("bad0", "bad1"):
        assert done[name].error.kind == "invalid_sampling"
        assert "structured_outputs" in done[name].error.message
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages


def test_a_matcher_that_broke_on_what_others_left_starts_afresh(characters, monkeypatch):
    grammars = Grammars(characters, VOCAB, [EOS])
    constraint = StructuredOutputs(regex="(a|b)*a(a|b){12}")
    tokens = characters.encode("abbabaabababbabbbaba")
    monkeypatch.setattr(actors.drafters.grammar, "LIMITS", LLParserLimits(max_lexer_states=12, verbose_errors=False))
    broken = grammars.new_matcher(constraint)
    monkeypatch.undo()
    whole = Grammars(characters, VOCAB, [EOS]).new_matcher(constraint)
    for token in tokens:
        words_PW = masks(broken, tokens[len(broken._token_ids) :][:4])
        assert (words_PW[0] == masks(whole)[0]).all()
        broken.append(token)
        whole.append(token)
        assert not broken.error


def test_a_constraint_too_complex_to_follow_is_an_error_and_not_an_answer(characters, monkeypatch):
    monkeypatch.setattr(actors.drafters.grammar, "LIMITS", LLParserLimits(max_lexer_states=12, verbose_errors=False))
    matcher = Grammars(characters, VOCAB, [EOS]).new_matcher(StructuredOutputs(regex="(a|b)*a(a|b){12}"))
    for token in characters.encode("abbabaabababbabbbabaabbaba"):
        masks(matcher, [token])
        matcher.append(token)
        if matcher.error:
            break
    assert "too complex" in matcher.error


def test_constraints_beyond_those_that_are_kept_compiled_still_work(characters):
    grammars = Grammars(characters, VOCAB, [EOS])
    matchers = [grammars.new_matcher(StructuredOutputs(regex=f"x{i}y")) for i in range(MAX_COMPILED + 9)]
    assert len(grammars._compiled) == MAX_COMPILED
    for i, matcher in enumerate(matchers):
        for token in characters.encode(f"x{i}y"):
            assert token in bits_of(masks(matcher)[0])
            matcher.append(token)
        assert matcher.is_done


def test_a_tokenizer_with_byte_fallback_writes_what_its_bytes_say():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", '"']
    backend = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    matcher = Grammars(tokenizer, 300, [2]).new_matcher(StructuredOutputs(choice=["a aé", "a b"]))
    text = []
    for piece in ("a", "▁a", "<0xC3>", "<0xA9>"):
        token = pieces.index(piece)
        assert token in bits_of(masks(matcher)[0], 300)
        matcher.append(token)
        text.append(token)
    assert matcher.is_done
    assert tokenizer.decode(text) == "a aé"


class WithoutEnd:
    """A tokenizer without a token for the end."""

    def __init__(self, tokenizer):
        self.backend_tokenizer, self.eos_token_id, self.size = tokenizer.backend_tokenizer, None, len(tokenizer)

    def __len__(self):
        return self.size


@pytest.mark.parametrize(
    ("wrap", "vocab_size", "message"),
    [
        (lambda tokenizer: object(), VOCAB, "needs a tokenizer with a tokenizer.json"),
        (lambda tokenizer: tokenizer, 90, "has 97 tokens, more than the model's 90 logits"),
        (WithoutEnd, VOCAB, "needs a token that ends an answer"),
    ],
)
def test_a_tokenizer_that_cannot_be_followed_is_refused_with_the_reason(wrap, vocab_size, message, characters):
    with pytest.raises(ValueError, match=message):
        read_tokenizer(wrap(characters), vocab_size, [])


DEEP = {"$defs": {"d0": {"type": "null"}}, "$ref": "#/$defs/d2999"}
DEEP["$defs"] |= {
    f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/d{i - 1}"}}]}
    for i in range(1, 3000)
}
NESTED = '{"items":' * 2000 + "{}" + "}" * 2000
MISTAKES = [
    ({}, "set exactly one of json, json_object, regex, choice and grammar, not none"),
    ({"json_object": True, "regex": "a"}, "not json_object and regex"),
    ({"json": [1]}, "of type list, should be an object"),
    ({"json": "{'a': 1}"}, "the schema is not valid JSON"),
    ({"json": {"enum": [float("nan")]}}, "cannot be written as JSON"),
    ({"json": {"type": "text"}}, "json cannot be followed: Invalid type: text"),
    ({"json": {"not": {}}}, r'Unimplemented keys: \["not"\]'),
    ({"json": {"enum": []}}, "Unsatisfiable schema"),
    ({"json": {"$ref": "#/$defs/none"}}, "does not exist"),
    ({"json": {"$ref": "http://127.0.0.1/schema"}}, "does not fetch"),
    ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
    ({"json": DEEP}, "more than 262144; make it smaller"),
    ({"json": NESTED}, "nested too deeply|recursion limit"),
    ({"regex": "a("}, "unclosed group"),
    ({"regex": "a" * MAX_GRAMMAR_BYTES}, "make it smaller"),
    ({"regex": "\ud800"}, "surrogates not allowed"),
    ({"choice": []}, "choice is empty"),
    ({"choice": ["a", ""]}, "holds an empty string"),
    ({"grammar": "start: nowhere"}, "unknown name"),
    ({"grammar": "start: " + "(" * 999 + '"a"' + ")" * 999}, "too deeply nested"),
    ({"regex": "a", "disable_any_whitespace": True}, "is for JSON, and regex is set"),
    ({"schema": {}}, "schema"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_a_constraint_that_cannot_be_followed_is_refused_before_there_is_a_model(fields, message):
    with pytest.raises(ValidationError, match=message):
        SamplingParams(structured_outputs=fields)


def test_a_long_chain_of_references_does_not_end_the_process():
    """In a process of its own, since that is what it would end."""
    code = (
        "import json\n"
        "from actors.structured_outputs import StructuredOutputs\n"
        "defs = {f'd{i}': {'items': {'$ref': f'#/$defs/d{i + 1}'}} for i in range(4000)}\n"
        "StructuredOutputs(json=json.dumps({'$defs': {**defs, 'd4000': {}}, '$ref': '#/$defs/d0'}))\n"
        "rules = '\\n'.join(f'r{i}: r{i + 1}' for i in range(2200))\n"
        "StructuredOutputs(grammar=f'start: r0\\n{rules}\\nr2200: \"x\"')\n"
        "print('alive')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "alive\n", run.stderr[-2000:]


def test_a_constraint_is_a_value_and_the_order_of_a_schemas_keys_is_part_of_it():
    first = SamplingParams(structured_outputs={"json": {"properties": {"b": {}, "a": {}}}})
    spaced = SamplingParams(structured_outputs={"json": '{"properties": {"b":{},  "a":{}}}'})
    other = SamplingParams(structured_outputs={"json": {"properties": {"a": {}, "b": {}}}})
    assert first == spaced != other
    assert len({first, spaced, other}) == 2
    assert SamplingParams.model_validate(first.model_dump()) == first
    assert first.model_dump(mode="json")["structured_outputs"]["json"] == '{"properties": {"b": {}, "a": {}}}'


def test_a_struct_whose_other_keys_are_null_is_a_constraint():
    fields = {"json": None, "json_object": None, "regex": "a+", "choice": None, "disable_any_whitespace": None}
    assert SamplingParams(structured_outputs=fields).structured_outputs == StructuredOutputs(regex="a+")

"""Text that is streamed: joined it is the whole text, and nothing is given that has to be taken back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.streamed_text import REPLACEMENT, Detokenizer, StreamedText

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "jobs" / "demo" / "model"
PIECES = ["a", "b", "▁", "▁the", "é", "ab", "🙂", "?"]


def byte_level():
    return AutoTokenizer.from_pretrained(SHIPPED_MODEL)


def byte_fallback():
    """As Llama 2's: pieces with ▁ for a space, bytes as <0xE2>, the first space of a text dropped."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
DETOKENIZERS = {name: Detokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def token_ids_of(name):
    """Half of them bytes, so that characters are often cut, broken and completed."""
    tokenizer = TOKENIZERS[name]
    bytes_of_characters = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "é€🙂".encode()])
    if name == "byte-level":
        bytes_of_characters = [tokenizer.encode(c, add_special_tokens=False) for c in "é€🙂"]
        bytes_of_characters = [token for tokens in bytes_of_characters for token in tokens]
    return st.one_of(st.sampled_from(bytes_of_characters), st.integers(0, len(tokenizer) - 1))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_joined_are_the_whole_text(name, data):
    token_ids = data.draw(st.lists(token_ids_of(name), max_size=150))
    stop = tuple(data.draw(st.lists(st.sampled_from(["e", " the", "ab", "a b", "🙂", "é€"]), max_size=2)))
    whole = DETOKENIZERS[name].decode(token_ids)
    # By the engine's rule: a text that ends for a stop is cut at the first stop string, any other is not.
    cuts = [at for at in (whole.find(one) for one in stop) if at >= 0]
    final = whole[: min(cuts)] if cuts and data.draw(st.booleans()) else whole

    streamed = StreamedText(DETOKENIZERS[name], stop)
    pieces, rest = [], token_ids
    while rest:
        size = data.draw(st.integers(1, 4))
        pieces.append(streamed.add(rest[:size]))
        rest = rest[size:]
    pieces.append(streamed.finish(final))
    assert "".join(pieces) == final


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_comes_whole_or_not_yet(name):
    tokenizer = TOKENIZERS[name]
    if name == "byte-fallback":
        ids = tokenizer.convert_tokens_to_ids(["a", *(f"<0x{byte:02X}>" for byte in "🙂".encode()), "b"])
    else:
        ids = tokenizer.encode("a🙂b", add_special_tokens=False)
        assert len(ids) >= 5, "a tokenizer that has the smiley as one token tests nothing"
    streamed = StreamedText(DETOKENIZERS[name], ())
    pieces = [streamed.add([token]) for token in ids]
    assert pieces[0] == "a" and "".join(pieces) == "a🙂b"
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_what_may_become_a_stop_string_waits():
    tokenizer = TOKENIZERS["byte-level"]
    streamed = StreamedText(DETOKENIZERS["byte-level"], ("END",))
    given = [streamed.add(tokenizer.encode(text, add_special_tokens=False)) for text in ("one E", "N", "E", "ND")]
    assert given == ["one ", "", "EN", ""]
    assert streamed.finish("one EN") == ""


def test_text_comes_at_once_when_nothing_speaks_against_it():
    ids = TOKENIZERS["byte-level"].encode("The printer is on fire again. " * 20, add_special_tokens=False)
    streamed = StreamedText(DETOKENIZERS["byte-level"], ("\n",))
    assert all(streamed.add([token]) == DETOKENIZERS["byte-level"].decode([token]) for token in ids)


def test_the_work_per_token_does_not_grow_with_the_text():
    lengths = []

    class Watched(Detokenizer):
        def decode(self, token_ids):
            lengths.append(len(token_ids))
            return super().decode(token_ids)

    streamed = StreamedText(Watched(TOKENIZERS["byte-level"]), ())
    for token in TOKENIZERS["byte-level"].encode("words and words. " * 200, add_special_tokens=False):
        streamed.add([token])
    assert len(lengths) > 300 and max(lengths) < 80


def test_a_text_that_does_not_begin_with_what_was_given_is_no_silent_matter():
    streamed = StreamedText(DETOKENIZERS["byte-level"], ())
    streamed.add(TOKENIZERS["byte-level"].encode("abc", add_special_tokens=False))
    with pytest.raises(RuntimeError, match="without streaming"):
        streamed.finish("xyz")

"""The draft model against a loop that recomputes everything, and where its pages change hands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from actors.config import EngineConfig, SpeculativeConfig
from actors.drafters.acceptance import Acceptance
from actors.drafters.draft_model import DraftModel, check_draft_model
from actors.drafters.drafting import Draft
from actors.requests import Request, SamplingParams
from actors.sequence import Sequence
from kernels.backend import sample
from kernels.sampling import SamplingBatch

PAGE_SIZE = 8
DEMO = Path(__file__).parents[2] / "jobs" / "demo"


def load(path: Path, num_pages: int = 32) -> DraftModel:
    config = EngineConfig(
        model=str(path),
        page_size=PAGE_SIZE,
        linear_compute="dense",
        speculative_config=SpeculativeConfig(method="draft_model", model=str(path), quantization="none"),
    )
    model = DraftModel(config, torch.device("cpu"), torch.float32)
    model.allocate(num_pages)
    model.join(Acceptance())
    # A chance of one everywhere, so that no draft ends early.
    model._chances[:] = [1.0] * len(model._chances)
    return model


def new_sequence(prompt: list[int], pages: list[int], seed: int = 0, **sampling: Any) -> Sequence:
    sequence = Sequence(Request("row", prompt, SamplingParams(max_tokens=60, **sampling), seed), 0, 200)
    sequence.pages = pages
    return sequence


def propose(model: DraftModel, sequences: list[Sequence], limit: int) -> list[list[int]]:
    drafts = [Draft() for _ in sequences]
    model.propose(sequences, drafts, [limit] * len(drafts))
    return [draft.token_ids for draft in drafts]


def write_naively(model: Any, sequence: Sequence, num_tokens: int) -> list[int]:
    """What the model writes after a sequence: transformers, all tokens again for each, and the engine's noise."""
    sampling = sequence.request.sampling
    tokens = list(sequence.token_ids)
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[:, -1].float()
        batch = SamplingBatch(
            temperature_B=torch.tensor([sampling.temperature]),
            top_k_B=torch.tensor([max(sampling.top_k, 0)]),
            top_p_B=torch.tensor([sampling.top_p]),
            min_p_B=torch.tensor([sampling.min_p]),
            seed_B=torch.tensor([sequence.seed]),
            position_B=torch.tensor([len(tokens)]),
        )
        tokens.append(int(sample(logits, batch).token_ids_B))
    return tokens[len(sequence.token_ids) :]


@pytest.fixture
def reference(model_zoo: Any, tiny_llama: Path) -> Any:
    return model_zoo.reference(tiny_llama)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 20, "min_p": 0.01}]
)
def test_drafts_are_what_the_model_itself_would_write_with_the_targets_noise(
    tiny_llama: Path, reference: Any, sampling: dict[str, Any]
) -> None:
    model = load(tiny_llama)
    sequences = [
        new_sequence([5, 9, 13, 40, 41], [3, 9, 4], seed=11, **sampling),
        new_sequence(list(range(20, 45)), [0, 1, 2, 5, 6], seed=12, **sampling),
        new_sequence([77], [7, 8], seed=13, **sampling),
    ]
    for accepted, other in [(3, 60), (0, 61), (2, 62)]:  # tokens of the draft that the target takes, and its own
        drafts = propose(model, sequences, 5)
        for sequence, draft in zip(sequences, drafts):
            assert draft == write_naively(reference, sequence, 5)
            for token in [*draft[:accepted], other]:
                sequence.append(token, 0.0)


def test_a_draft_goes_on_from_another_drafters_tokens(tiny_llama: Path, reference: Any) -> None:
    model = load(tiny_llama)
    sequence = new_sequence([5, 9, 13], [0, 1, 2])
    draft = Draft([50, 51], [0, 0], [1.0, 1.0], [0, 0])
    model.propose([sequence], [draft], [5])
    continued = new_sequence([5, 9, 13, 50, 51], [])
    assert draft.token_ids == [50, 51, *write_naively(reference, continued, 3)]
    for token in (50, 60):  # the second of the other's tokens was wrong
        sequence.append(token, 0.0)
    assert propose(model, [sequence], 4) == [write_naively(reference, sequence, 4)]


def test_drafts_end_where_the_pages_end_and_waiting_sequences_get_none(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    nearly_full = new_sequence(list(range(30, 30 + PAGE_SIZE * 2 - 1)), [0, 1])
    waiting = new_sequence([5, 6, 7], [])
    drafts = propose(model, [nearly_full, waiting], 10)
    assert len(drafts[0]) == 2  # one slot is left, and the last token needs none
    assert drafts[1] == []


def test_a_preempted_sequence_is_drafted_as_if_it_had_never_left(tiny_llama: Path, reference: Any) -> None:
    model = load(tiny_llama)
    sequence, other = new_sequence(list(range(20, 38)), [0, 1, 2, 3]), new_sequence(list(range(50, 75)), [0, 1, 2, 3])
    expected = write_naively(reference, sequence, 4)
    assert propose(model, [sequence], 4) == [expected]
    # Another one gets the pages meanwhile, and the first one comes back to the very same ones.
    sequence.num_preemptions += 1
    propose(model, [other], 4)
    assert propose(model, [sequence], 4) == [expected]
    sequence.num_preemptions += 1
    sequence.pages = [9, 8, 7, 6]
    assert propose(model, [sequence], 4) == [expected]


def count_computed(model: DraftModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    forward = model.decoder.forward

    def counted(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(len(token_ids))
        return forward(token_ids, *rest)

    monkeypatch.setattr(model.decoder, "forward", counted)
    return counts


def test_shared_pages_are_computed_once_and_only_if_the_draft_model_filled_them(
    tiny_llama: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_llama)
    counts = count_computed(model, monkeypatch)
    prefix = list(range(20, 20 + 2 * PAGE_SIZE))
    first = new_sequence([*prefix, 60, 61], [0, 1, 2])
    # The target found the prefix in its cache; this model has never seen it.
    first.num_cached = len(prefix)
    assert propose(model, [first], 2) == [write_naively(reference, first, 2)]
    assert counts == [len(prefix) + 2, 1]
    counts.clear()
    second = new_sequence([*prefix, 70, 71, 72], [0, 1, 3])
    assert propose(model, [second], 2) == [write_naively(reference, second, 2)]
    assert counts == [3, 1]
    counts.clear()
    stranger = new_sequence([99 - 5, *prefix[1:], 70, 71], [0, 1, 4])  # page numbers alone prove nothing
    assert propose(model, [stranger], 1) == [write_naively(reference, stranger, 1)]
    assert counts == [len(prefix) + 2]


def test_a_copied_page_counts_as_computed_and_a_cleared_one_does_not(
    tiny_llama: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_llama)
    tokens = list(range(20, 20 + PAGE_SIZE + 6))
    propose(model, [new_sequence(tokens, [0, 1])], 1)
    model.copy_slots(1, 5, 4)
    counts = count_computed(model, monkeypatch)
    sequence = new_sequence([*tokens[: PAGE_SIZE + 4], 70, 71, 72], [0, 5])
    assert propose(model, [sequence], 1) == [write_naively(reference, sequence, 1)]
    assert counts == [3]
    counts.clear()
    model.clear([0])
    again = new_sequence(sequence.token_ids, [0, 5])
    assert propose(model, [again], 1) == [write_naively(reference, again, 1)]
    assert counts == [len(again.token_ids)]


def test_confidence_falls_where_the_model_itself_is_unsure(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    draft = Draft()
    model.propose([new_sequence([5, 9, 13], [0, 1, 2])], [draft], [8])
    cells = [cell - model._cells for cell in draft.cells]
    assert len(cells) == 8
    assert all(0 <= cell < 10 for cell in cells)
    assert len(set(cells)) > 1


def test_the_shipped_pair_fits_together() -> None:
    check_draft_model(str(DEMO / "model"), str(DEMO / "draft"))


def test_a_draft_model_with_another_vocabulary_is_refused_naming_both(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 97 .*1024") as refused:
        check_draft_model(str(DEMO / "model"), str(tiny_llama))
    assert str(DEMO / "model") in str(refused.value)
    assert str(tiny_llama) in str(refused.value)


def test_a_draft_model_with_another_tokenizer_is_refused_naming_the_token(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(other)
    with pytest.raises(ValueError, match="'A' is 36 and 35"):
        check_draft_model(str(tiny_llama), str(other))
    check_draft_model(str(tiny_llama), str(other), tokenizer_uri=str(other))

"""Sampling on the CPU and in the Triton kernel: keyed noise, filters, penalties, logprobs."""

import math

import numpy as np
import pytest
import torch

from kernels.sampling import (
    NOISE_MIN,
    NOISE_SPAN,
    AllowedTokens,
    Candidates,
    Penalties,
    SamplingBatch,
    gumbel_of_bits,
    likely_candidates,
    noise_bits,
    philox_4x32,
    sample_cpu,
    sample_triton,
)

PI_WORDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
# Known-answer vectors of Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI_WORDS[:4], PI_WORDS[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def batch_of(num_rows, device="cpu", **fields):
    """Rows that differ from plain sampling in `fields`, each a value for all rows or one per row."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    tensors = {}
    for name, value in values.items():
        value = fields.pop(name, value)
        dtype = torch.float32 if name in ("temperature", "top_p", "min_p") else torch.int64
        rows = list(value) if hasattr(value, "__len__") else [value] * num_rows
        tensors[f"{name}_B"] = torch.tensor(rows, dtype=dtype, device=device)
    return SamplingBatch(**tensors, **fields)


def random_logits(num_rows, vocab_size, seed=0, scale=3.0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(params=["cpu", "triton"])
def sample(request):
    """Both versions, each called with CPU tensors."""
    if request.param == "cpu":
        return sample_cpu
    device = request.getfixturevalue("device")

    def sample_on_device(logits, batch):
        moved = {name: getattr(batch, name) for name in batch.__slots__}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        if batch.penalties is not None:
            fields = {name: getattr(batch.penalties, name).to(device) for name in batch.penalties.__slots__}
            moved["penalties"] = Penalties(**fields)
        if batch.allowed is not None:
            moved["allowed"] = AllowedTokens(batch.allowed.rows, batch.allowed.words_MW.to(device))
        result = sample_triton(logits.to(device), SamplingBatch(**moved))
        fields = {name: getattr(result, name) for name in result.__slots__}
        return type(result)(**{name: None if x is None else x.cpu() for name, x in fields.items()})

    return sample_on_device


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words):
    c0, c1, c2, c3, key0, key1 = (np.array([word], np.uint64) for word in (*counter, *key))
    assert tuple(philox_4x32(c0, c1, (key0, key1), c2, c3)[0]) == words


def naive_noise(seed, position, candidate):
    """The contract's formula, one candidate at a time."""
    key = (np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32))
    words = philox_4x32(np.array([candidate // 4], np.uint64), np.uint64(position), key)
    v = (int(words[0, candidate % 4]) + 0.5) * 2.0**-32
    return -math.log(-math.log1p(-min(v, 1 - 2.0**-24)))


def test_noise_is_a_function_of_seed_position_and_candidate_alone():
    wanted = [(2**63 - 1, 2**32 - 1, [0, 1, 5, 6, 7, 1000]), (5, 3, [2, 3, 4]), (5, 4, [2, 3, 4])]
    bits = noise_bits([(seed, position, np.array(ids)) for seed, position, ids in wanted])
    for (seed, position, ids), row in zip(wanted, bits):
        expected = [naive_noise(seed, position, candidate) for candidate in ids]
        assert gumbel_of_bits(row).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_noise_stays_in_the_range_that_pruning_assumes():
    extremes = gumbel_of_bits(np.array([0, 1, 2**32 - 1, 2**31], np.uint32))
    assert extremes.max() - extremes.min() < NOISE_SPAN
    assert extremes.min() > NOISE_MIN
    borders = np.array([2**25 - 1, 2**25, 2**25 + 1], np.uint32)  # where the series takes over
    assert gumbel_of_bits(borders).tolist() == pytest.approx([-math.log(-math.log1p(-(2**-7)))] * 3, rel=1e-5)


def test_the_kernel_draws_the_same_tokens_as_the_cpu(device):
    num_rows, vocab_size = 12, 203
    logits = random_logits(num_rows, vocab_size)
    seeds = [(i * 0x9E3779B97F4A7C15) % 2**63 for i in range(num_rows)]
    positions = [i * 2**27 + i for i in range(num_rows)]
    arguments = {"temperature": [0.5 + i / 10 for i in range(num_rows)], "seed": seeds, "position": positions}
    on_cpu = sample_cpu(logits, batch_of(num_rows, **arguments))
    on_device = sample_triton(logits.to(device), batch_of(num_rows, device, **arguments))
    assert torch.equal(on_cpu.token_ids_B, on_device.token_ids_B.cpu())
    torch.testing.assert_close(on_cpu.logprobs_B, on_device.logprobs_B.cpu(), rtol=1e-5, atol=1e-5)


def test_sampling_is_the_argmax_of_scaled_logits_plus_noise(sample):
    vocab_size, seed, position = 37, 123456789012345, 77
    logits = random_logits(1, vocab_size)
    noise = [naive_noise(seed, position, candidate) for candidate in range(vocab_size)]
    expected = (logits[0] / 0.7 + torch.tensor(noise)).argmax()
    result = sample(logits, batch_of(1, temperature=0.7, seed=seed, position=position))
    assert result.token_ids_B.tolist() == [int(expected)]


def test_greedy_rows_take_the_first_of_the_largest(sample):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-1.0, -2.0, -1.0, -5.0]])
    assert sample(logits, batch_of(2, temperature=[0.0, 9e-6])).token_ids_B.tolist() == [1, 0]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 63, 5000])
def test_any_vocabulary_size_is_allowed(vocab_size, sample):
    logits = random_logits(3, vocab_size)
    result = sample(logits, batch_of(3, temperature=[0.0, 1.0, 1.0], top_k=[0, 0, 5], seed=[0, 1, 2]))
    assert result.token_ids_B[0] == logits[0].argmax()
    assert (result.token_ids_B < vocab_size).all()
    expected = logits.log_softmax(1).gather(1, result.token_ids_B[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs_B, expected, rtol=1e-5, atol=1e-5)


def test_logprobs_are_those_of_the_raw_logits(sample):
    logits = random_logits(2, 50)
    penalties = one_token_penalties(2, token=int(logits[0].argmax()), repetition=50.0)
    batch = batch_of(2, temperature=[0.0, 2.0], top_k=3, num_top_logprobs=4, penalties=penalties)
    result = sample(logits, batch)
    raw = logits.log_softmax(1)
    torch.testing.assert_close(result.logprobs_B, raw.gather(1, result.token_ids_B[:, None])[:, 0])
    expected, ids = raw.topk(4)
    assert torch.equal(result.top_ids_BL, ids)
    torch.testing.assert_close(result.top_logprobs_BL, expected)


def one_token_penalties(num_rows, token, count=1, repetition=1.0, presence=0.0, frequency=0.0):
    return Penalties(
        torch.tensor([[token, -1, -1]] * num_rows),
        torch.tensor([[count, 0, 0]] * num_rows, dtype=torch.int32),
        torch.full((num_rows,), repetition),
        torch.full((num_rows,), presence),
        torch.full((num_rows,), frequency),
    )


PENALTIES = {
    "repetition divides a positive logit": ([4.0, 3.0, 1.0], {"repetition": 1.5, "count": 0}, 1),
    "repetition multiplies a negative logit": ([-1.0, -1.4, -9.0], {"repetition": 1.5, "count": 0}, 1),
    "presence counts once": ([4.0, 3.0, 1.0], {"presence": 0.9, "count": 5}, 0),
    "presence needs an output": ([4.0, 3.0, 1.0], {"presence": 2.0, "count": 0}, 0),
    "presence": ([4.0, 3.0, 1.0], {"presence": 1.1, "count": 1}, 1),
    "frequency counts each": ([4.0, 3.0, 1.0], {"frequency": 0.4, "count": 3}, 1),
    "a negative presence invites": ([4.0, 3.0, 1.0, 3.5], {"presence": -1.5, "count": 1, "token": 1}, 1),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_change_what_is_chosen(name, sample):
    logits, arguments, expected = PENALTIES[name]
    penalties = one_token_penalties(1, **{"token": 0, **arguments})
    assert sample(torch.tensor([logits]), batch_of(1, temperature=0.0, penalties=penalties)).token_ids_B == expected


def test_banned_tokens_are_never_chosen_and_other_rows_keep_them(sample):
    logits = torch.tensor([[5.0, 4.0, 3.0]] * 3)
    batch = batch_of(3, temperature=[0.0, 0.0, 0.01], banned=[(0, 0), (2, 0), (2, 1)])
    assert sample(logits, batch).token_ids_B.tolist() == [1, 0, 2]


def pack(allowed):
    """Bools [M, V] as words."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 2100])
def test_only_allowed_tokens_are_chosen_and_other_rows_choose_from_all(vocab_size, sample):
    logits = random_logits(5, vocab_size)
    allowed = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(1)) < 0.1
    allowed[torch.arange(3), torch.tensor([0, vocab_size - 1, vocab_size // 2])] = True
    filters = {"temperature": [0.0, 0.0, 0.9, 2.0, 0.9], "seed": [1, 2, 3, 4, 5], "top_k": [0, 0, 0, 40, 0]}
    filters["top_p"] = [1.0, 1.0, 0.9, 1.0, 1.0]
    rows = [0, 2, 3]
    result = sample(logits, batch_of(5, **filters, allowed=AllowedTokens(rows, pack(allowed))))
    masked = logits.clone()
    masked[rows] = masked[rows].masked_fill(~allowed, -math.inf)
    assert torch.equal(result.token_ids_B, sample(masked, batch_of(5, **filters)).token_ids_B)
    assert all(allowed[i, result.token_ids_B[row]] for i, row in enumerate(rows))
    plain = sample(logits, batch_of(5, **filters))
    assert torch.equal(result.token_ids_B[[1, 4]], plain.token_ids_B[[1, 4]])
    # As with all filters, the log-probabilities are of the raw logits.
    logprobs = logits.log_softmax(1).gather(1, result.token_ids_B[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs_B, logprobs, rtol=1e-5, atol=1e-5)


def test_bans_and_penalties_hold_among_the_allowed_tokens(sample):
    logits = torch.tensor([[9.0, 5.0, 4.0, 3.0]] * 2)
    allowed = AllowedTokens([0, 1], pack(torch.tensor([[False, True, True, True]] * 2)))
    assert sample(logits, batch_of(2, temperature=0.0, allowed=allowed, banned=[(0, 1)])).token_ids_B.tolist() == [2, 1]
    penalties = one_token_penalties(2, token=1, repetition=4.0, count=1)
    assert sample(logits, batch_of(2, temperature=0.0, allowed=allowed, penalties=penalties)).token_ids_B.tolist() == [
        2,
        2,
    ]


def kept_by(logits, top_k=0, top_p=1.0, min_p=0.0):
    """The filters by sorting, in float64."""
    x = logits.double()
    if min_p:
        x = x.masked_fill(x < x.max() + math.log(min_p), -math.inf)
    if top_k:
        x = x.masked_fill(x < x.sort(descending=True).values[top_k - 1], -math.inf)
    if top_p < 1:
        probs = x.softmax(0)
        above = torch.stack([probs[x > value].sum() for value in x])
        x = x.masked_fill(above >= top_p, -math.inf)
    return x.exp() / x.exp().sum()


FILTERS = {
    "none": {},
    "top_k": {"top_k": 3},
    "top_k of one": {"top_k": 1},
    "top_k within a tie": {"top_k": 4},
    "top_k between the two zeros": {"top_k": 6},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all three": {"top_k": 8, "top_p": 0.8, "min_p": 0.05},
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_filtered_softmax(name):
    num_rows = 10_000
    logits = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0, -3.0])
    expected = kept_by(logits, **FILTERS[name]) * num_rows
    batch = batch_of(num_rows, seed=range(1000, 1000 + num_rows), position=range(num_rows), **FILTERS[name])
    counts = torch.bincount(sample_cpu(logits.repeat(num_rows, 1), batch).token_ids_B, minlength=10).double()
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    # The 99.99 % point of chi-square (Wilson-Hilferty); the draws are fixed by their seeds, so this never flickers.
    limit = freedom * (1 - 2 / (9 * max(freedom, 1)) + 3.719 * math.sqrt(2 / (9 * max(freedom, 1)))) ** 3
    assert chi_square <= limit


TIED_LOGITS = torch.tensor([2.0, -1.0, 1.5, 1.0, 1.5, 0.0, -0.0, -0.5, -1.0, -2.0, 1.0])


@pytest.fixture(scope="module")
def seed_of_token():
    """For each token a seed with which it is drawn from TIED_LOGITS, if no filter drops it."""
    num_seeds = 4000
    drawn = sample_cpu(TIED_LOGITS.repeat(num_seeds, 1), batch_of(num_seeds, seed=range(num_seeds))).token_ids_B
    return [drawn.tolist().index(token) for token in range(len(TIED_LOGITS))]


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_exactly_what_sorting_keeps_and_all_of_a_tie(name, sample, seed_of_token):
    vocab_size = len(TIED_LOGITS)
    # The filters act on scaled logits, so these are scaled up and the temperature brings them back.
    batch = batch_of(vocab_size, temperature=64.0, seed=seed_of_token, **FILTERS[name])
    drawn = sample((TIED_LOGITS * 64).repeat(vocab_size, 1), batch).token_ids_B
    kept = (drawn == torch.arange(vocab_size)).nonzero()[:, 0]
    assert kept.tolist() == kept_by(TIED_LOGITS, **FILTERS[name]).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 3e5])
def test_pruning_changes_no_token(scale):
    num_rows, vocab_size = 200, 300
    logits = random_logits(num_rows, vocab_size, scale=scale)
    batch = batch_of(num_rows, seed=range(num_rows), position=5)
    every_id = np.arange(vocab_size)
    bits = noise_bits([(row, 5, every_id) for row in range(num_rows)])
    expected = [int((logits[row].numpy() + gumbel_of_bits(bits[row])).argmax()) for row in range(num_rows)]
    assert sample_cpu(logits, batch).token_ids_B.tolist() == expected


def test_pruning_leaves_few_candidates_of_a_peaked_row():
    logits = random_logits(1, 5000, scale=3.0)
    logits[0, 17] = 20.0
    ids, scaled = likely_candidates(logits.numpy()[0], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    assert len(ids) == int((logits >= 20 - NOISE_SPAN).sum())
    live = Candidates(0, ids, scaled).could_win(noise_bits([(1, 1, ids)])[0])
    assert 1 <= live.sum() < 100
    assert 17 in ids[live]


def test_a_rows_result_does_not_depend_on_its_batch(sample):
    num_rows = 6
    logits = random_logits(num_rows, 300)
    arguments = {
        "temperature": [0.0, 0.7, 1.0] * 2,
        "top_k": [0, 5, 0] * 2,
        "top_p": [1.0, 0.9] * 3,
        "min_p": [0.0, 0.0, 0.01] * 2,
        "seed": list(range(num_rows)),
        "position": list(range(50, 50 + num_rows)),
    }
    together = sample(logits, batch_of(num_rows, **arguments))
    for rows in ([1], [5, 2]):
        part = sample(logits[rows], batch_of(len(rows), **{k: [v[r] for r in rows] for k, v in arguments.items()}))
        assert torch.equal(part.token_ids_B, together.token_ids_B[rows])
        assert torch.equal(part.logprobs_B, together.logprobs_B[rows])


def test_the_kernels_noise_is_philoxs(device):
    """All logits alike, so that each draw is decided by the noise alone, over the whole key and counter range."""
    num_rows, vocab_size = 16, 64
    seeds = [i * (2**63 - 1) // (num_rows - 1) for i in range(num_rows)]
    positions = [i * (2**32 - 1) // (num_rows - 1) for i in range(num_rows)]
    bits = noise_bits([(s, p, np.arange(vocab_size)) for s, p in zip(seeds, positions)])
    logits = torch.zeros(num_rows, vocab_size, device=device)
    result = sample_triton(logits, batch_of(num_rows, device, seed=seeds, position=positions))
    assert result.token_ids_B.tolist() == [int(row.argmin()) for row in bits]


def test_nan_logits_show_in_the_logprob(sample):
    logits = random_logits(3, 20)
    logits[1, 4] = math.nan
    result = sample(logits, batch_of(3, temperature=[0.0, 1.0, 1.0]))
    assert result.logprobs_B.isnan().tolist() == [False, True, False]


BAD = {
    "logits are torch.float16": lambda: sample_cpu(torch.zeros(1, 4, dtype=torch.float16), batch_of(1)),
    r"top_k_B is \(2,\)": lambda: sample_cpu(torch.zeros(1, 4), batch_of(1, top_k=[1, 2])),
    "num_top_logprobs=5": lambda: sample_cpu(torch.zeros(1, 4), batch_of(1, num_top_logprobs=5)),
    r"banned pair \(0, 4\)": lambda: sample_cpu(torch.zeros(1, 4), batch_of(1, banned=[(0, 4)])),
    r"words_MW is torch.int32 \(1, 2\)": lambda: sample_with_allowed([0], torch.ones(1, 2, dtype=torch.int32)),
    "words_MW is torch.int64": lambda: sample_with_allowed([0], torch.ones(1, 1, dtype=torch.int64)),
    r"rows with allowed tokens are \[1, 0\]": lambda: sample_with_allowed([1, 0], torch.ones(2, 1, dtype=torch.int32)),
    r"rows with allowed tokens are \[2\]": lambda: sample_with_allowed([2], torch.ones(1, 1, dtype=torch.int32)),
}


def sample_with_allowed(rows, words):
    return sample_cpu(torch.zeros(2, 4), batch_of(2, allowed=AllowedTokens(rows, words)))


@pytest.mark.parametrize("message", BAD)
def test_inputs_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()

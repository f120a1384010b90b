"""The Triton kernels in deterministic mode: one path for any number of rows and any cut of a prompt.

In Triton's interpreter this shows that rows and tokens take the same tiles and splits; that a GPU's matrix instructions
then give the same bits shows only on one.
"""

import pytest
import torch
from attention_cases import make_case

from kernels.attention_batch import AttentionBatch
from kernels.attention_plan import plan_attention
from kernels.int4_linear import Int4Linear, QuantizedWeight
from kernels.paged_attention import paged_attention_triton


@pytest.mark.parametrize("window", [None, 9])
def test_a_tokens_bits_are_the_same_in_one_chunk_and_token_by_token(window, device):
    q, k, v, batch = make_case(1, [(9, 30), (1, 12)], scattered=True)
    q, k, v = q.to(device), k.to(device).contiguous(), v.to(device).contiguous()
    whole = paged_attention_triton(q, k, v, batch, 0.25, window, deterministic=True)
    for i in range(9):
        alone = AttentionBatch([1], [22 + i], [batch.page_ids[0]], batch.page_size)
        assert torch.equal(paged_attention_triton(q[i : i + 1], k, v, alone, 0.25, window, True)[0], whole[i])
    plain = paged_attention_triton(q, k, v, batch, 0.25, window)
    torch.testing.assert_close(whole, plain, atol=2e-6, rtol=2e-5)


def test_every_query_token_has_parts_of_its_own_and_groups_are_left_out():
    *_, batch = make_case(2, [(5, 21), (1, 25), (9, 40)], shared=[(0, 3, 2)])
    plan = plan_attention(batch, 3, None, torch.device("cpu"), deterministic=True)
    assert len(plan.large_parts) == 0
    assert plan.small_parts[:, 0].tolist() == list(range(15)) and set(plan.small_parts[:, 1].tolist()) == {1}
    assert plan.small_parts[:, 4].tolist() == [*range(17, 22), 25, *range(32, 41)]


def test_int4_rows_take_one_tile_however_many_they_are(device):
    torch.manual_seed(0)
    weight = QuantizedWeight(torch.randint(0, 16, (72, 256), dtype=torch.uint8), torch.rand(72, 8) * 0.1, 32)
    layer = Int4Linear(weight, None, dtype=torch.float16, device=device, deterministic=True)
    x = torch.randn(300, 256).to(device=device, dtype=torch.float16)
    whole = layer(x)
    for rows in ([0], [17, 3], list(range(40, 105)), list(range(299, -1, -1))):
        assert torch.equal(layer(x[rows]), whole[rows])
    assert "in fixed tiles of 64 rows" in layer.describe()

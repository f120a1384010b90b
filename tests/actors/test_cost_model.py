"""Splitting a step's time: no nanosecond is lost, whatever the weights."""

from hypothesis import given
from hypothesis import strategies as st

from actors.cost_model import split_exactly


@given(st.integers(0, 10**12), st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=50))
def test_the_parts_sum_to_the_total_and_none_is_negative(total_ns, weights):
    parts = split_exactly(total_ns, weights)
    assert len(parts) == len(weights)
    assert sum(parts) == total_ns
    assert min(parts) >= 0


def test_parts_are_in_proportion_to_the_nanosecond():
    assert split_exactly(1000, [1.0, 2.0, 7.0]) == [100, 200, 700]
    assert split_exactly(10, [1.0, 1.0, 1.0]) == [3, 4, 3]

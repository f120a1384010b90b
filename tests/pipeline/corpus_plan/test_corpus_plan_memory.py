"""A million rows are planned in the memory of a small worker, and the driver's does not grow with them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_plan_memory import count_rows, in_its_own_process, measure

from pipeline.shards import Shard
from pipeline.storage import Storage

pytestmark = pytest.mark.slow


def test_a_million_rows_of_three_hundred_tokens_are_planned_with_two_gib_per_worker_and_a_flat_driver():
    small, large = measure(100_000, 10), measure(1_000_000, 10)
    for step in ("sort", "merge"):
        assert large[step]["peak_mib"] < 2048, step
        assert small["finish"]["peak_mib"] + 20 > large["finish"]["peak_mib"], "ten times the rows, and a flat driver"
    assert large["duplicates"] == 100_000
    assert large["achievable_prefix_tokens"] > 0.95 * 900_000 * 250


@pytest.mark.parametrize("row_group_size", [5_000, 1_000_000], ids=["many row groups", "one row group"])
def test_reading_a_large_shard_takes_little_memory_whatever_its_row_groups(tmp_path, row_group_size):
    values = [f"{i:08d}".encode() * 512 for i in range(50_000)]  # 200 MB, which is left as it is
    table = pa.table({"prompt": pa.array(values, pa.binary())})
    options = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=row_group_size, **options)
    info = Storage(str(tmp_path)).info("a.parquet")
    assert info is not None and info.size_bytes > 200e6
    report: dict = {}
    shard = Shard("a", info.uri, info.size_bytes, info.etag, 50_000)
    assert in_its_own_process(report, "read", count_rows, shard) == 50_000
    assert report["read"]["peak_mib"] - report["read"]["start_mib"] < 120

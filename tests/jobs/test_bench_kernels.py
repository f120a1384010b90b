"""The bench of kernels: red rows have no times, unmeasured bars do not hold, tables are kept and pasted."""

import json

import pytest
import torch

import jobs.bench.kernels.tune as tune
from jobs.bench import bench
from jobs.bench.kernels import run_part
from jobs.bench.kernels.bars import FLOOR_MS, judge
from jobs.bench.kernels.case import Case, Prepared, run_case
from jobs.bench.kernels.table import MARKERS, markdown, paste_table
from jobs.bench.kernels.timing import measure
from kernels.compare import ErrorReport
from kernels.tuned import TABLE, LinearTile, read_tile

CPU = torch.device("cpu")


def row_of(prepare, is_timed=True):
    return run_case(Case("small", "a case", prepare), CPU, {"copy_gb_per_s": 2.0}, is_timed)


def prepared(check=lambda: True, **fields):
    return Prepared(lambda: torch.ones(8).sum(), check, **fields)


def test_a_right_case_has_times_rates_and_shares():
    row = row_of(lambda: prepared(num_bytes=1000, baselines={"torch": lambda: torch.ones(8).sum()}))
    assert row["is_correct"]
    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert row["gb_per_s"] == pytest.approx(1e-6 / (row["p50_ms"] / 1e3))
    assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 2)
    assert row["baselines"]["torch"]["speedup"] > 0
    assert "share_of_matmul" not in row


@pytest.mark.parametrize("check", [lambda: False, lambda: ErrorReport(error=2.0, budget=1.0, column=3)])
def test_a_wrong_case_has_no_times(check):
    row = row_of(lambda: prepared(check))
    assert not row["is_correct"]
    assert "p50_ms" not in row
    assert "baselines" not in row


def test_a_case_that_breaks_is_red_and_a_baseline_that_breaks_is_said():
    def broken():
        raise RuntimeError("no such kernel")

    row = row_of(broken)
    assert not row["is_correct"]
    assert "no such kernel" in row["failure"]
    row = row_of(lambda: prepared(baselines={"other": broken}))
    assert row["is_correct"]
    assert row["baselines"] == {"other": {"failure": "RuntimeError: no such kernel"}}


def test_without_a_gpu_every_bar_is_not_measured():
    red, *bars = judge([{"part": "small", "name": "x", "is_correct": True, "p50_ms": 1.0}], "cpu")
    assert (red.value, red.holds) == (0, True)
    assert len(bars) > 30
    assert all(bar.value is None and bar.holds is None and bar.bar is not None for bar in bars)


def test_bars_are_judged_by_the_rows_of_a_gpu():
    def row(name, **values):
        return {"part": "", "name": name, "is_correct": True, "p50_ms": 1.0, **values}

    rows = [
        row("int4 g128 8192x8192 M=16", share_of_copy=0.8),
        row("int4 g128 8192x8192 M=64", share_of_copy=0.1, baselines={"torch bfloat16": {"speedup": 1.5}}),
        row("decode bf16 B=64 context=1024", share_of_copy=0.9),
        row("verify 4 bf16 B=64 context=1024") | {"p50_ms": 1.4},
        row("decode bf16 B=128 context=4224 shared=4096") | {"p50_ms": 6.0},
        row("decode bf16 B=128 context=4224 shared=4096 grouped"),
        row("Llama-3-8B int4 step bf16 B=1") | {"p50_ms": FLOOR_MS["bf16", 1] * 1.2},
        {"part": "", "name": "decode int8 B=64 context=1024", "is_correct": False, "failure": "wrong"},
    ]
    bars = {bar.name: bar for bar in judge(rows, "cuda")}
    assert bars["int4 g128 8192x8192 M=16: share of copy"].holds is True
    assert bars["int4 g128 8192x8192 M=64: times torch bfloat16"].holds is False
    assert bars["verify 4 bf16 B=64 context=1024: times a decode"].holds is False
    assert bars["128 requests on 4k shared: times faster grouped"].value == pytest.approx(6.0)
    assert bars["Llama-3-8B int4 step bf16 B=1: times the floor"].value == pytest.approx(1.2)
    assert bars["decode int8 B=64 context=1024: share of copy"].value is None
    assert bars["cases whose check failed"].holds is False


def test_a_part_that_dies_leaves_a_red_row(capsys):
    (row,) = run_part("no_such_part", "cpu", [])
    assert not row["is_correct"]
    assert "no_such_part" in row["failure"]
    assert json.loads(capsys.readouterr().out) == row


def test_the_table_is_pasted_between_the_markers_and_shows_red_rows(tmp_path):
    rows = [
        {"name": "a", "is_correct": False, "failure": "wrong"},
        {"name": "b", "is_correct": True},
        {
            "name": "c",
            "is_correct": True,
            **{"p20_ms": 0.1, "p50_ms": 0.2, "p80_ms": 0.3, "gb_per_s": 4000.0, "share_of_copy": 0.91},
            "baselines": {"torch": {"p50_ms": 0.4, "speedup": 2.0}, "gemlite": {"failure": "no"}},
        },
    ]
    record, part, readme = tmp_path / "record.json", tmp_path / "part.json", tmp_path / "README.md"
    record.write_text(json.dumps({"config": {"kernels": rows[:2]}}))
    part.write_text(json.dumps({"config": {"kernels": rows[1:]}}))
    readme.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    paste_table([record, part], readme)
    text = readme.read_text()
    assert text == f"before\n{MARKERS[0]}\n{markdown(rows)}\n{MARKERS[1]}\nafter\n"
    assert "| a | **wrong or broken** |" in text
    assert "| c | 0.1 / 0.2 / 0.3 | 4000 | 91% |  |  | 2.00x torch; gemlite failed |" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        paste_table([record], readme)


def test_the_committed_tiles_are_in_the_form_that_tuning_writes():
    text = TABLE.read_text(encoding="utf-8")
    assert tune.format_table(json.loads(text)) == text


def test_a_tuned_tile_takes_the_place_of_its_kind_alone(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    table.write_text(TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tune, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def tiles(bits, group_size):
        entries = json.loads(table.read_text())["int4_linear"]["sm_80"]["tiles"]
        found = [read_tile(entry) for entry in entries]
        return [tile for tile in found if bits in tile.bits and group_size in tile.group_sizes]

    others = [(bits, group) for bits in (4, 8) for group in (32, 64, 128) if (bits, group) != (4, 64)]

    def same(tile):
        return (tile.max_rows, tile.rows, tile.columns, tile.warps, tile.stages, tile.programs)

    before = {kind: [same(tile) for tile in tiles(*kind)] for kind in others}
    new = LinearTile(64, 64, 64, 4, 5, 999, True, False, (4,), (64,))
    tune.keep_tile("sm_80", new)
    assert {kind: [same(tile) for tile in tiles(*kind)] for kind in others} == before
    assert [tile for tile in tiles(4, 64) if tile.max_rows == 64] == [new]
    assert json.loads(table.read_text())["int4_linear"]["sm_80"]["from"].startswith("measured on a GPU, ")


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="it must be one of machine, linear"):
        bench("kernels", only="everything")
    with pytest.raises(ValueError, match="it must be like g128"):
        tune._chosen("g96")
    assert tune._chosen("g64/16") == ([64], [16])
    assert tune._chosen(None) == ([128, 64, 32], [16, 32, 64, 512])


def test_a_call_on_a_cpu_is_timed_at_least_ten_times():
    calls = []
    times = measure(lambda: calls.append(0), CPU)
    assert times.how == "cpu"
    assert len(calls) > 10

"""`shoal quantize` from the outside: prompts in, a checkpoint and a card out; mistakes named, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.weights.checkpoint import open_checkpoint
from jobs import cli
from jobs.bench.quantize import MARKERS, is_decoded_alike, markdown, paste_table
from jobs.calibration import Calibration, CalibrationColumns, read_calibration
from jobs.demo.tickets import make_tickets

DEMO = Path(__file__).parents[2] / "jobs" / "demo" / "model"
EXIT_USAGE = 2


def shoal(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["shoal", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve tickets as messages, with the answers in a column of their own, and a row that is no prompt."""
    rows = [
        {
            "messages": [{"role": "user", "content": ticket.text}],
            "response": ticket.gold,
        }
        for ticket in make_tickets(12, seed=1)
    ]
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist([*rows, {"messages": None, "response": None}]), path)
    return path


def test_a_checkpoint_and_a_card_without_prompts_come_out(monkeypatch, capsys, tmp_path, prompts) -> None:
    out = tmp_path / "out"
    words = ["--calibrate", prompts, "--response-column", "response", "--method", "awq", "--head", "int8"]
    assert shoal(monkeypatch, "quantize", "demo", out, "--rows", 13, *words) == 0
    assert "KL from the original" in capsys.readouterr().out

    card = (out / "README.md").read_text()
    assert "awq" in card and "prompts.parquet, 11 rows" in card and "license: apache-2.0" in card
    assert not any(ticket.text in card or ticket.gold in card for ticket in make_tickets(12, seed=1))
    assert (out / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (DEMO / "generation_config.json").read_bytes()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "README.md").stat().st_mode & 0o777}
    written = open_checkpoint(str(out))
    assert is_decoded_alike(written, out)
    head = written.packed_format("lm_head")
    assert head is not None and head.bits == 8 and not written.architecture.tied_head


def test_a_target_chooses_bits_and_keeps_to_it(monkeypatch, capsys, tmp_path, prompts) -> None:
    out = tmp_path / "out"
    words = ["--calibrate", prompts, "--method", "hqq", "--rows", 6]
    assert shoal(monkeypatch, "quantize", "demo", out, "--target-bytes", 2_300_000, *words) == 0
    shown = capsys.readouterr().out
    assert "chosen" in shown and "█" in shown
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) < 2_310_000 + 20_000
    measured = json.loads((out / "sensitivity.json").read_text())
    assert len(measured) == 16 and len({row["chosen_bits"] for row in measured}) > 1
    written = open_checkpoint(str(out))
    packed = written.packed_format("model.layers.0.mlp.down_proj")
    chosen = next(row["chosen_bits"] for row in measured if (row["layer"], row["part"]) == (0, "down"))
    assert (16 if packed is None else packed.bits) == chosen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "gptq"], "give --calibrate"),
        (["--method", "rtn", "--target-bits", "4"], "give --calibrate"),
        (["--method", "magic"], "method"),
        (["--method", "rtn", "--bits", "5"], "bits"),
        (["--method", "rtn", "--group-size", "48"], "group_size is 48"),
        (["--calibrate", "{prompts}", "--prompt-column", "question"], "column 'question' is not there"),
        (["--calibrate", "none-such.parquet"], "matches no Parquet file"),
        (["--calibrate", "{prompts}", "--target-bits", "2", "--rows", "2", "--row-tokens", "9"], "raise --target-bits"),
        (["--method", "rtn", "--device", "abacus"], "--device is 'abacus'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(monkeypatch, capsys, tmp_path, prompts, words, said) -> None:
    words = [word.format(prompts=prompts) for word in words]
    assert shoal(monkeypatch, "quantize", "demo", tmp_path / "out", *words) == EXIT_USAGE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_calibration_reads_a_sample_of_rows_with_their_answers(prompts) -> None:
    columns = CalibrationColumns(response="response")
    every = read_calibration(str(prompts), str(DEMO), num_rows=100, max_tokens=1000, columns=columns)
    assert len(every.sequences) == 12
    plain = read_calibration(str(prompts), str(DEMO), num_rows=100, max_tokens=1000, columns=CalibrationColumns())
    assert all(a[: len(b)] == b and len(a) > len(b) for a, b in zip(every.sequences, plain.sequences))
    some = read_calibration(str(prompts), str(DEMO), num_rows=5, max_tokens=20, columns=columns)
    assert 4 <= len(some.sequences) <= 5 and {len(ids) for ids in some.sequences} == {20}


def test_rows_that_judge_are_not_rows_that_calibrate() -> None:
    used, held_out = Calibration("x", [[i] for i in range(40)]).split()
    assert len(held_out) == 5 and sorted(used + held_out) == [[i] for i in range(40)]
    assert Calibration("x", [[1], [2]]).split() == ([[1], [2]], [])


def test_a_wrong_bit_in_a_written_file_is_seen_by_the_bench(monkeypatch, tmp_path) -> None:
    out = tmp_path / "out"
    assert shoal(monkeypatch, "quantize", "demo", out, "--method", "rtn", "--bits", 3) == 0
    written = open_checkpoint(str(out))
    assert is_decoded_alike(written, out)
    other = tmp_path / "other"
    shutil.copytree(out, other)
    file = other / "model-00003-of-00006.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert not is_decoded_alike(written, other)


def test_the_readmes_table_is_the_records(tmp_path) -> None:
    row = {
        "model": "demo", "method": "gptq", "bits_per_weight": 4.125, "kl_mean": 0.0012,
        "kl_mean_interval": [0.001, 0.0015],
        "kl_p99": 0.02, "top1_agreement": 0.977, "right_answers": 0.998, "right_answers_original": 0.995,
    }  # fmt: skip
    record, readme = tmp_path / "record.json", tmp_path / "README.md"
    record.write_text(json.dumps({"config": {"quality": [row]}}))
    readme.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    paste_table(record, readme)
    assert readme.read_text() == f"before\n{MARKERS[0]}\n{markdown([row])}\n{MARKERS[1]}\nafter\n"
    assert "0.0012 (0.0010 to 0.0015)" in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must have the lines"):
        paste_table(record, readme)

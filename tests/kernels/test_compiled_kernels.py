"""Every kernel compiles for its GPUs: no spills, matrix instructions where it multiplies, few instructions per weight.

Triton brings its own assembler, so no GPU is needed. Nothing is run: this says nothing about speed or results there.
compiled_kernels.json is what was found when the kernels were last changed; it is rewritten by
`python tests/kernels/compile_kernels.py write`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it is on Linux)", allow_module_level=True)

SCRIPT = Path(__file__).with_name("compile_kernels.py")
TABLE = json.loads(SCRIPT.with_name("compiled_kernels.json").read_text(encoding="utf-8"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MULTIPLYING = {"attend_kernel", "attend_int8_kernel", "int4_linear_kernel"}
ALL_KERNELS = MULTIPLYING | {
    "add_rms_norm_kernel",
    "embed_rms_norm_kernel",
    "norm_rope_write_kernel",
    "silu_mul_kernel",
    "write_kv_kernel",
    "write_quantized_kernel",
    "merge_kernel",
    "expand_kernel",
    "sample_kernel",
    "penalise_kernel",
    "allow_kernel",
}
KERNELS_OF = {
    arch: ALL_KERNELS | ({"write_fp8_kernel"} if arch in ("sm_90", "sm_100") else set()) for arch in ARCHITECTURES
}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that a program may have; sm_80's kernels run on sm_86, sm_89 and sm_120 too, whose limit is the smallest."""
MOST_PER_UNIT = {"int4_linear_kernel": 3.5, "attend_int8_kernel": 6.9}
"""Thread-instructions per 4-bit weight, and per number of int8 keys and values, up to 16 rows, on sm_90: an H200's
memory delivers 33 to 37 weights, or half as many bytes, per clock and multiprocessor, which issues 128."""


def compile_kernels(which, arch, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(SCRIPT.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), which, arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def committed_rows():
    rows = [dict(zip(TABLE["columns"], values)) for values in TABLE["table"]]
    return {(row["arch"], row["kernel"], row["rows"], row["label"]): row for row in rows}


def faults_of(row):
    """What is wrong with a compiled kernel; empty where nothing is."""
    faults = []
    if row["spills"]:
        faults.append("spills")
    if (row["mma"] > 0) != (row["kernel"] in MULTIPLYING):
        faults.append("matrix instructions")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        faults.append("shared memory")
    if is_hot_path(row) and row["per_unit"] > MOST_PER_UNIT[row["kernel"]]:
        faults.append("instructions per unit")
    return faults


def is_hot_path(row):
    has_limit = row["kernel"] == "attend_int8_kernel" or (
        row["kernel"] == "int4_linear_kernel" and " int4 " in row["label"]
    )
    return has_limit and row["rows"] == 16 and row["arch"] == "sm_90"


def assert_as_committed(rows):
    """Registers within a tenth (or 8), matrix instructions within a tenth, as many spills."""
    committed = committed_rows()
    for row in rows:
        known = committed.get((row["arch"], row["kernel"], row["rows"], row["label"]))
        assert known is not None, f"compiled_kernels.json has no row for {row}; rewrite it"
        for name, slack in (("registers", 8), ("mma", 0), ("spills", 0)):
            allowed = max(slack, known[name] / 10)
            assert abs(row[name] - known[name]) <= allowed, f"{name}: compiled_kernels.json has {known}, now {row}"


@pytest.mark.timeout(900)
def test_each_kernel_compiles_for_hopper(tmp_path):
    rows = compile_kernels("first", "sm_90", tmp_path)
    assert {row["kernel"] for row in rows} == KERNELS_OF["sm_90"]
    assert [row for row in rows if faults_of(row)] == []
    assert {row["kernel"] for row in rows if is_hot_path(row)} == set(MOST_PER_UNIT)
    assert_as_committed(rows)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_the_kernels_that_multiply_compile_for_other_gpus(arch, tmp_path):
    rows = compile_kernels("few", arch, tmp_path)
    assert {row["kernel"] for row in rows} == MULTIPLYING
    assert [row for row in rows if faults_of(row)] == []
    assert_as_committed(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_shipped_launch_compiles(arch, tmp_path):
    rows = compile_kernels("all", arch, tmp_path)
    assert {row["kernel"] for row in rows} == KERNELS_OF[arch]
    assert [row for row in rows if faults_of(row)] == []
    assert_as_committed(rows)
    labels = {(row["arch"], row["kernel"], row["rows"], row["label"]) for row in rows}
    assert labels == {key for key in committed_rows() if key[0] == arch}, (
        "compiled_kernels.json has rows of old launches"
    )


def test_the_committed_table_has_no_fault():
    rows = list(committed_rows().values())
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    assert [row for row in rows if faults_of(row)] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 2}, "spills"),
        ({"mma": 0}, "matrix instructions"),
        ({"shared": 300 * 1024}, "shared memory"),
        ({"per_unit": 7.0}, "instructions per unit"),
    ],
)
@pytest.mark.parametrize("kernel", MOST_PER_UNIT)
def test_a_fault_is_found(kernel, change, fault):
    row = next(row for row in committed_rows().values() if is_hot_path(row) and row["kernel"] == kernel)
    assert faults_of(row) == []
    assert faults_of(row | change) == [fault]
    with pytest.raises(AssertionError, match=r"compiled_kernels\.json has"):
        assert_as_committed([row | {"registers": row["registers"] * 2}])

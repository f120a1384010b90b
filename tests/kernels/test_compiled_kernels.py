"""Every kernel compiles for its GPUs, without spilling, and with matrix instructions where it multiplies.

Triton brings its own assembler, so no GPU is needed. Nothing is run: this says nothing about speed or results there.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
MULTIPLYING = {"attend_kernel", "int4_linear_kernel"}
ALL_KERNELS = MULTIPLYING | {
    "rms_norm_kernel",
    "silu_mul_kernel",
    "rope_kernel",
    "write_kv_kernel",
    "write_quantized_kernel",
    "merge_kernel",
    "expand_kernel",
    "sample_kernel",
    "penalise_kernel",
    "allow_kernel",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed here (it is on Linux)"
)


def compile_kernels(which, arch, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(SCRIPT.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), which, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_sound(results):
    assert {result["kernel"] for result in results} == ALL_KERNELS
    for result in results:
        assert result["spills"] == 0, result
        assert (result["mma"] > 0) == (result["kernel"] in MULTIPLYING), result
        assert result["shared"] <= 99 * 1024, result  # what a program may have on the smallest sm_8x


def test_each_kernel_compiles_for_hopper(tmp_path):
    assert_sound(compile_kernels("first", 90, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_variant_of_each_kernel_compiles(arch, tmp_path):
    assert_sound(compile_kernels("all", arch, tmp_path))

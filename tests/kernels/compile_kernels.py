"""Compiles every kernel ahead of time, as its launcher would launch it, for GPUs that need not be here.

`python compile_kernels.py all 80` (`first` instead of `all`: one launch of each kernel) prints a JSON object per
compiled launch: registers, shared memory, and how many matrix instructions and accesses of spilled registers its
code holds. Run by test_compiled_kernels.py in a process of its own, where Triton is not in its interpreter's mode.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import paged_attention
from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.int4_linear import Int4Linear, QuantizedWeight
from kernels.kv_cache import write_kv_triton
from kernels.on_demand import KernelOnDemand
from kernels.quantized_kv import new_quantized_pages, write_quantized_kv_triton
from kernels.rms_norm import add_rms_norm_triton, rms_norm_triton
from kernels.rope import rope_triton
from kernels.sampling import AllowedTokens, Penalties, SamplingBatch, sample_triton
from kernels.silu_mul import silu_mul_triton

TOOLS = Path(nvidia.__file__).parent / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands in for a kernel's launch and keeps the arguments."""

    def __init__(self):
        self.launches = []
        self.label = ""

    def record(self, kernel, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.label, kernel, args, kwargs))

        return launch


def launch_everything(recorder):
    """Call each launcher with the shapes of an 8B Llama; nothing is computed."""
    for dtype in (torch.bfloat16, torch.float16):
        recorder.label = str(dtype).removeprefix("torch.")
        x = torch.zeros(16, 4096, dtype=dtype)
        weight = torch.ones(4096, dtype=dtype)
        rms_norm_triton(x, weight, 1e-5)
        add_rms_norm_triton(x, x.clone(), weight, 1e-5)
        silu_mul_triton(torch.zeros(16, 2 * 14336, dtype=dtype))
        q, k = torch.zeros(16, 32, 128, dtype=dtype), torch.zeros(16, 8, 128, dtype=dtype)
        rope_triton(q, k, torch.arange(16), torch.zeros(64, 64), torch.zeros(64, 64))
        pages = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in new_kv_pages(32, 8, 16, 128, dtype, k.device)]
        write_kv_triton(k, k, *pages, torch.arange(16))
        write_quantized_kv_triton(k, k, *new_quantized_pages(32, 8, 16, 128, k.device), torch.arange(16))
        for head_dim in (64, 80, 128, 256):
            launch_attention(recorder, head_dim, dtype)
        for group_size in (32, 64, 128):
            for zeros in (False, True):
                launch_int4(recorder, group_size, zeros, dtype)
    recorder.label = "sampling"
    rows = torch.zeros(4)
    ids = torch.zeros(4, dtype=torch.int64)
    penalties = Penalties(ids[:, None], ids[:, None].int(), rows, rows, rows)
    allowed = AllowedTokens([0, 2], torch.zeros(2, 1000, dtype=torch.int32))
    batch = SamplingBatch(rows, ids, rows, rows, ids, ids, penalties=penalties, allowed=allowed)
    sample_triton(torch.zeros(4, 32000), batch)


def launch_attention(recorder, head_dim, dtype):
    device = torch.device("cpu")
    dense, int8 = new_kv_pages(64, 8, 16, head_dim, dtype, device), new_quantized_pages(64, 8, 16, head_dim, device)
    for pages, window in ((dense, None), (dense, 128), (int8, None), (int8, 128)):
        recorder.label = f"{str(dtype).removeprefix('torch.')} D={head_dim} window={window} {pages[0].dtype}"
        batch = AttentionBatch([1, 1, 14], [600, 40, 600], [list(range(40))] * 3, 16, [PrefixGroup(0, 2, [0, 1])])
        paged_attention.paged_attention_triton(torch.zeros(16, 32, head_dim, dtype=dtype), *pages, batch, 0.1, window)


def launch_int4(recorder, group_size, zeros, dtype):
    q = torch.zeros(512, 1024, dtype=torch.uint8)
    groups = torch.ones(512, 1024 // group_size)
    layer = Int4Linear(
        QuantizedWeight(q, groups, group_size, groups.byte() if zeros else None),
        None,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for num_rows in (16, 32, 64, 300):
        recorder.label = f"{str(dtype).removeprefix('torch.')} g{group_size} zeros={zeros} M={num_rows}"
        layer(torch.zeros(num_rows, 1024, dtype=dtype))


def compile_launch(kernel, args, kwargs, arch):
    """What Triton would compile at this launch: types, alignment by 16, and ones as constants."""
    function = kernel.jit_function()
    names = function.arg_names
    values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    if "ASM" in values:
        values["ASM"] = True  # as on a CUDA tensor
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = values[name]
        if name.isupper() or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "mma": len(re.findall(r"\b(?:HGMMA|HMMA)\.", code)),
        "async_copies": len(re.findall(r"\bLDGSTS\.", code)),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.M)),
    }


def main(which, arch):
    recorder = Recorder()
    KernelOnDemand.__getitem__ = lambda kernel, grid: recorder.record(kernel, grid)
    paged_attention.is_hopper = lambda device: arch >= 90
    launch_everything(recorder)
    seen = set()
    for label, kernel, args, kwargs in recorder.launches:
        name = kernel.function.__name__.strip("_")
        rows = kwargs.get("ROWS")
        if which == "first" and (name, rows) in seen:
            continue
        seen.add((name, rows))
        result = describe(compile_launch(kernel, args, kwargs, arch))
        print(json.dumps({"kernel": name, "rows": rows, "label": label, "arch": arch, **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

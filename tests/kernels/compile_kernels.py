"""Compiles every kernel ahead of time, as its launcher would launch it, for GPUs that need not be here.

    python tests/kernels/compile_kernels.py all sm_90   # `first`: a launch of each kernel and tile; `few`: of two
    python tests/kernels/compile_kernels.py write       # all of all architectures, into compiled_kernels.json
    python tests/kernels/compile_kernels.py write merge_kernel  # only some kernels' rows, one after the other

The first prints a JSON object per compiled launch: registers, shared memory, spilled registers, matrix instructions,
and what the hot loop is made of. Nothing is run. Called by test_compiled_kernels.py in a process of its own, where
Triton is not in its interpreter's mode.

Of NVIDIA's GPUs the machine code is read (Triton brings its own assembler and disassembler), of AMD's the assembly that
LLVM emits, which is what is assembled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels.int4_linear
from kernels import int8_attention, paged_attention
from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.draft_tree import tree_mask
from kernels.fp8_kv import new_fp8_pages, write_fp8_kv_triton
from kernels.int4_linear import Int4Linear, QuantizedWeight
from kernels.kv_cache import write_kv_triton
from kernels.on_demand import KernelOnDemand
from kernels.qkv import norm_rope_write_kv_triton
from kernels.quantized_kv import new_quantized_pages, write_quantized_kv_triton
from kernels.rms_norm import add_rms_norm_triton, embed_rms_norm_triton
from kernels.sampling import AllowedTokens, Penalties, SamplingBatch, sample_triton
from kernels.silu_mul import silu_mul_triton

TOOLS = Path(nvidia.__file__).parent / "bin"
TABLE = Path(__file__).with_name("compiled_kernels.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
HAVE_FP8 = ("sm_90", "sm_100")
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

SASS = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)(.*)"
SASS_LABEL = r"^\s*(\.L_x_\d+):"
SASS_BRANCH = r"\(?(\.L_x_\d+)\)?"
GCN = r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_[a-z0-9_]+)(.*)"
GCN_LABEL = r"^(\.LBB\d+_\d+):"
GCN_BRANCH = r"(\.LBB\d+_\d+)"
KINDS = {
    "mma": r"HGMMA|HMMA|UTCHMMA|v_mfma",
    "loads": r"LDG|LDS|LDSM|UTMALDG|UBLKCP|LDTM|ds_(?:read|load)|global_load|buffer_load",
    "stores": r"ST[GSL]|STSM|STTM|ds_write|ds_store|global_store|buffer_store",
    "other": r"BAR|BRA|DEPBAR|LDGDEPBAR|WARPGROUP|MEMBAR|FENCE|NOP|SYNCS|ERRBAR|WARPSYNC|s_",
}
"""By the beginning of an instruction's name; what is none of these is arithmetic ("alu")."""
MULTIPLYING = ("attend_kernel", "attend_int8_kernel", "int4_linear_kernel")
FEWEST_ROWS = 16
COLUMNS = ("registers", "stack", "shared", "spills", "mma", "instructions", "loop", "per_unit")
MIX = ("mma", "loads", "stores", "other", "alu")


class Recorder:
    """Stands in for a kernel's launch and keeps the arguments."""

    def __init__(self):
        self.launches = []
        self.label = ""

    def record(self, kernel, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.label, kernel, args, kwargs))

        return launch


def launch_everything(recorder, arch):
    """Call each launcher with the shapes of an 8B Llama; nothing is computed.

    float16 only with one head dimension and one group size: its code is bfloat16's with other names.
    """
    for dtype in (torch.bfloat16, torch.float16):
        recorder.label = str(dtype).removeprefix("torch.")
        x = torch.zeros(16, 4096, dtype=dtype)
        weight = torch.ones(4096, dtype=dtype)
        embed_rms_norm_triton(torch.arange(16), torch.zeros(64, 4096, dtype=dtype), weight, 1e-5)
        add_rms_norm_triton(x, x.clone(), weight, 1e-5)
        silu_mul_triton(torch.zeros(16, 2 * 14336, dtype=dtype))
        launch_kv_writes(recorder, dtype, arch)
        is_bf16 = dtype == torch.bfloat16
        for bits in (4, 8):
            for group_size in (32, 64, 128) if is_bf16 else (128,):
                for zeros in (True, False):  # `first` then has what takes most instructions
                    launch_int4(recorder, bits, group_size, zeros, dtype)
        for head_dim in (64, 80, 128, 256) if is_bf16 else (128,):
            launch_attention(recorder, head_dim, dtype, arch)
    recorder.label = "sampling"
    rows = torch.zeros(4)
    ids = torch.zeros(4, dtype=torch.int64)
    penalties = Penalties(ids[:, None], ids[:, None].int(), rows, rows, rows)
    allowed = AllowedTokens([0, 2], torch.zeros(2, 1000, dtype=torch.int32))
    batch = SamplingBatch(rows, ids, rows, rows, ids, ids, penalties=penalties, allowed=allowed)
    sample_triton(torch.zeros(4, 32000), batch)


def launch_kv_writes(recorder, dtype, arch):
    """With norms of queries and keys, as of a Qwen3: a model without leaves out a part of this code."""
    name, slots, tables = recorder.label, torch.arange(16), [torch.zeros(64, 64)] * 2
    k, norms = torch.zeros(16, 8, 128, dtype=dtype), [torch.ones(128, dtype=dtype)] * 2
    dense = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in new_kv_pages(32, 8, 16, 128, dtype, k.device)]
    int8 = new_quantized_pages(32, 8, 64, 128, k.device, in_pairs=True)
    write_kv_triton(k, k, *dense, slots)
    write_quantized_kv_triton(k, k, *int8, slots)
    if arch in HAVE_FP8:
        write_fp8_kv_triton(k, k, *new_fp8_pages(32, 8, 16, 128, k.device), slots)
    for kind, pages in (("", dense), (" int8 pages", int8)):
        recorder.label = name + kind
        qkv = torch.zeros(16, 48, 128, dtype=dtype)
        norm_rope_write_kv_triton(qkv, tuple(norms), 1e-5, slots, *tables, *pages, slots)
    recorder.label = name


def launch_attention(recorder, head_dim, dtype, arch):
    device = torch.device("cpu")
    name = f"{str(dtype).removeprefix('torch.')} D={head_dim}"
    dense = new_kv_pages(64, 8, 16, head_dim, dtype, device)
    for window in (None, 128):
        recorder.label = f"{name} window={window} {dtype}"
        attend(dense, head_dim, dtype, window)
    for page_size in (64, 16) if head_dim == 128 and dtype == torch.bfloat16 else (64,):
        int8 = new_quantized_pages(64, 8, page_size, head_dim, device, in_pairs=True)
        for window in (None, 128):
            recorder.label = f"{name} window={window} int8 pages of {page_size}"
            attend(int8, head_dim, dtype, window)
    if arch in HAVE_FP8 and head_dim in (64, 128):
        for window in (None, 128):
            recorder.label = f"{name} window={window} fp8"
            attend(new_fp8_pages(64, 8, 16, head_dim, device), head_dim, dtype, window)
    if head_dim in (64, 128) and dtype == torch.bfloat16:
        int8 = new_quantized_pages(64, 8, 64, head_dim, device, in_pairs=True)
        for kind, pages in ((dtype, dense), ("int8 pages of 64", int8)):
            recorder.label = f"{name} sinks, trees {kind}"
            attend_drafts(pages, head_dim, dtype)


def attend(pages, head_dim, dtype, window):
    page_size = pages[0].shape[2]
    tables = [list(range(-(-600 // page_size)))] * 3
    batch = AttentionBatch([1, 1, 14], [600, 140, 600], tables, page_size, [PrefixGroup(0, 2, [0, 1])])
    paged_attention.paged_attention_triton(torch.zeros(16, 32, head_dim, dtype=dtype), *pages, batch, 0.1, window)


def attend_drafts(pages, head_dim, dtype):
    """Rows of decodes, and of drafts in a tree, behind sinks."""
    page_size = pages[0].shape[2]
    tables = [list(range(-(-600 // page_size)))] * 2
    batch = AttentionBatch([1, 4], [600, 600], tables, page_size, trees={1: tree_mask([-1, 0, 0, 1])})
    q, sinks = torch.zeros(5, 32, head_dim, dtype=dtype), torch.zeros(32)
    paged_attention.paged_attention_triton(q, *pages, batch, 0.1, sinks_N=sinks)


def launch_int4(recorder, bits, group_size, zeros, dtype):
    """Each tile of tuned.json, and the expansion. K is that of an 8B model, as splits and strides follow from it.

    Gated is what takes most instructions and registers, and what most models have: 4 bits with zero points, bfloat16.
    """
    q = torch.zeros(128, 4096, dtype=torch.uint8)
    scale = torch.ones(128, 4096 // group_size)
    weight = QuantizedWeight(q, scale, group_size, scale.byte() if zeros else None, bits)
    for gated in (False, True) if zeros and bits == 4 and dtype == torch.bfloat16 else (False,):
        layer = Int4Linear(weight, None, dtype=dtype, device=torch.device("cpu"), gated=gated)
        kind = f"{str(dtype).removeprefix('torch.')} int{bits} g{group_size}{' zeros' if zeros else ''}"
        kind += " gated" if gated else ""
        for tile in layer.tiles:
            recorder.label = f"{kind} M={tile.max_rows}"
            layer(torch.zeros(tile.max_rows, 4096, dtype=dtype))
        recorder.label = kind
        layer.expand()


def compile_launch(kernel, args, kwargs, arch):
    """What Triton would compile at this launch: types, alignment by 16, and ones as constants."""
    function = kernel.jit_function()
    names = function.arg_names
    values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    is_cuda = TARGETS[arch].backend == "cuda"
    if "ASM" in values:
        values["ASM"] = is_cuda  # as on a tensor there
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
    if not is_cuda:
        options.pop("maxnreg", None)
    return triton.compile(source, target=TARGETS[arch], options=options)


def describe(compiled, arch):
    """Registers per thread, bytes of stack and shared memory, spilling instructions, and the hot loop."""
    if TARGETS[arch].backend == "hip":
        return describe_gcn(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    names, loops = read_loops(code, SASS, SASS_LABEL, SASS_BRANCH, "BRA")
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "spills": sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        **describe_code(names, loops),
    }


def describe_gcn(compiled):
    code = compiled.asm["amdgcn"]

    def entry(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", code)[1])

    names, loops = read_loops(code, GCN, GCN_LABEL, GCN_BRANCH, ("s_cbranch", "s_branch"))
    return {
        "registers": entry("vgpr_count"),
        "stack": entry("private_segment_fixed_size"),
        "shared": entry("group_segment_fixed_size") or compiled.metadata.shared,
        # Scalar registers spill into lanes of vector registers, not to memory.
        "spills": entry("vgpr_spill_count"),
        **describe_code(names, loops),
    }


def read_loops(code, instruction, label, target, branch):
    """All instructions' names, and (first, last) of each stretch that a branch goes back over."""
    names, labels, loops = [], {}, []
    for line in code.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(names)
        elif found := re.match(instruction, line):
            names.append(found[1])
            to = re.search(target, found[2]) if found[1].startswith(branch) else None
            if to and labels.get(to[1], len(names)) < len(names) - 1:
                loops.append((labels[to[1]], len(names) - 1))
    return names, loops


def describe_code(names, loops):
    """The whole and the hot loop: the longest innermost one that multiplies matrices, else the longest innermost."""
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [Counter(kind_of(name) for name in names[first : last + 1]) for first, last in innermost]
    bodies = [body for body in bodies if body["mma"]] or bodies
    loop = max(bodies, key=lambda body: body.total(), default=Counter())
    return {
        "mma": sum(kind_of(name) == "mma" for name in names),
        "instructions": len(names),
        "loop": {kind: loop[kind] for kind in MIX},
    }


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "alu")


def units_of(name, args, kwargs, kernel):
    """What one turn of the hot loop works on: weights of int4_linear, numbers of keys and of values of attention."""
    values = dict(zip(kernel.jit_function().arg_names, args)) | kwargs
    if name == "int4_linear_kernel":
        return values["COLUMNS"] * values["DEPTH"]
    if name in ("attend_kernel", "attend_int8_kernel"):
        return 2 * values["KEYS"] * (values["head_dim"] if "head_dim" in values else values["HEAD_DIM"])
    return None


def compile_all(which, arch):
    """Yield a row per compiled launch; which: "all", "first" of each kernel and tile, "few" of them, or names
    of kernels, with commas between, for all launches of these."""
    recorder = Recorder()
    KernelOnDemand.__getitem__ = lambda kernel, grid: recorder.record(kernel, grid)
    paged_attention.is_hopper = lambda device: arch in ("sm_90", "sm_100")
    kernels.int4_linear.architecture_of = int8_attention.architecture_of = lambda device: arch
    launch_everything(recorder, arch)
    seen = set()
    for label, kernel, args, kwargs in recorder.launches:
        name = kernel.function.__name__.strip("_")
        rows = kwargs.get("ROWS")
        key = (name, rows) if which in ("first", "few") else (name, rows, label)
        is_left_out = which == "few" and (name not in MULTIPLYING or rows != FEWEST_ROWS)
        is_meant = which in ("all", "first", "few") or name in which.split(",")
        if key in seen or is_left_out or not is_meant:
            continue
        seen.add(key)
        row = describe(compile_launch(kernel, args, kwargs, arch), arch)
        threads = kwargs.get("num_warps", 4) * TARGETS[arch].warp_size
        units = units_of(name, args, kwargs, kernel)
        row["per_unit"] = units and round(sum(row["loop"].values()) * threads / units, 3)
        yield {"kernel": name, "rows": rows, "label": label, "arch": arch, **row}


def compile_in_process(which, arch):
    """The rows of `compile_all` from a process of its own, as it bends the launchers towards an architecture."""
    command = [sys.executable, __file__, which, arch]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arch}: {done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_table(names):
    """Compile everything for all architectures, two at a time, and write TABLE; or all launches of some kernels, one at
    a time, and write their rows in place of those that TABLE has."""
    if names:
        rows = [row for row in read_table().values() if row["kernel"] not in names]
        rows += [row for arch in TARGETS for row in compile_in_process(",".join(names), arch)]
    else:
        with ThreadPoolExecutor(2) as pool:
            rows = [row for found in pool.map(lambda arch: compile_in_process("all", arch), TARGETS) for row in found]
    TABLE.write_text(format_table(rows), encoding="utf-8")


def format_table(rows):
    """One line per row, so that a change is read in a diff."""
    head = {"triton": triton.__version__, "columns": ["arch", "kernel", "rows", "label", *COLUMNS], "loop": MIX}
    lines = []
    for row in sorted(rows, key=lambda row: (row["arch"], row["kernel"], row["label"], row["rows"] or 0)):
        values = [row["arch"], row["kernel"], row["rows"], row["label"]]
        values += [[row["loop"][k] for k in MIX] if name == "loop" else row[name] for name in COLUMNS]
        lines.append(json.dumps(values, separators=(",", ":")))
    return json.dumps(head)[:-1] + ', "table": [\n' + ",\n".join(lines) + "\n]}\n"


def read_table():
    """The committed rows by (arch, kernel, rows, label)."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], values)) for values in table["table"]]
    for row in rows:
        row["loop"] = dict(zip(table["loop"], row["loop"]))
    return {(row["arch"], row["kernel"], row["rows"], row["label"]): row for row in rows}


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_table(sys.argv[2:])
    else:
        for found_row in compile_all(sys.argv[1], sys.argv[2]):
            print(json.dumps(found_row), flush=True)

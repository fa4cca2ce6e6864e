"""Compile the Triton kernels for Hopper (sm_90) on any machine, and read from the machine code what will be slow.

A row per kernel and shape: registers of a thread, bytes it spills, shared memory, programs that an SM has room for, how
many copies stay in flight while it computes (cp.async.wait_group; 0 means that loads are not pipelined), tensor-core
instructions. Ends with 1 where a kernel spills, a loop that should be pipelined is not, or an SM has room for fewer
programs than the launch counts on.
usage: TRITON_INTERPRET=0 python -m tools.compile_triton [--only PATTERN] [--json FILE]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from megatron_distkv.kernels.triton.attention import attention_kernel
from megatron_distkv.kernels.triton.backward import key_gradients_kernel, query_gradients_kernel
from megatron_distkv.kernels.triton.merge import merge_kernel
from megatron_distkv.kernels.triton.shapes import attention_shape, backward_shapes
from megatron_distkv.kernels.triton.store import rope_kernel, store_kv_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
REGISTERS_OF_AN_SM, SHARED_OF_AN_SM, SHARED_OF_A_PROGRAM = 65536, 228 << 10, 227 << 10
RESERVED_SHARED = 1 << 10  # of each program, for the driver
FLOATS = {"scale", "soft_cap"}
POINTERS_TO_FP32 = {"OUT", "LSE", "OUTS", "LSES", "DELTA", "D_K", "D_V", "D_Q", "COS", "SIN", "K_SCALES", "V_SCALES"}
POINTERS_TO_INT64 = {"IDS", "STARTS", "CU_BLOCKS", "CU_QUERIES", "POSITIONS", "SLOTS"}
HEAD = {"D": 128, "D_PADDED": 128}
STORE = {"KV_HEADS": 8, "HEADS_PADDED": 8, "N": 64, **HEAD}
MERGE = {**HEAD, "P_PADDED": 64, "BLOCK_P": 16, "BLOCK_R": 2}


class Built(NamedTuple):
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    per_sm: int
    copies_in_flight: int
    tensor_core: str


class Wanted(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    per_sm: int = 1
    is_pipelined: bool = False
    pool: str = "bf16"


def attention(name: str, num_rows: int, size: int = 64, head_dim: int = 128, **kind: bool) -> Wanted:
    """As `micro_attention` would launch it for sequences of `num_rows` rows each; causal if `kind` says nothing."""
    is_exact, is_windowed, is_int8 = (kind.get(key, False) for key in ("EXACT", "WINDOWED", "INT8"))
    shape = attention_shape(num_rows, 1, head_dim, size, is_exact, is_windowed, is_int8)
    constants = {"G": 4, "N": size, "D": head_dim, "D_PADDED": head_dim, "CAUSAL": True, "WINDOWED": False}
    constants |= {"CAPPED": False, "EXACT": False, "INT8": False, **kind}
    constants |= {"BLOCK_M": shape.rows, "BLOCK_N": shape.keys}
    pool = "i8" if is_int8 else "fp32" if is_exact else "bf16"
    return Wanted(
        name, attention_kernel, constants, shape.num_warps, shape.num_stages, shape.per_sm, not is_exact, pool
    )


def backward(name: str, head_dim: int = 128) -> list[Wanted]:
    wanted, kernels = [], (key_gradients_kernel, query_gradients_kernel)
    constants = {"H": 32, "G": 4, "D": head_dim, "D_PADDED": head_dim, "CAUSAL": True, "EXACT": False}
    for kernel, shape, what in zip(kernels, backward_shapes(head_dim), ("keys", "queries"), strict=True):
        tile = {"BLOCK_M": shape.rows, "BLOCK_N": shape.keys}
        is_pipelined = shape.num_stages > 2
        options = (shape.num_warps, shape.num_stages, shape.per_sm, is_pipelined)
        wanted.append(Wanted(f"{name}, {what}", kernel, constants | tile, *options))
    return wanted


DECODE, PREFILL = 4, 1 << 12  # rows of a sequence
WANTED = [
    attention("decode", DECODE),
    attention("decode, no mask", DECODE, CAUSAL=False),
    attention("decode, window", DECODE, WINDOWED=True),
    attention("decode, soft cap", DECODE, CAPPED=True),
    attention("decode, int8", DECODE, INT8=True),
    attention("decode, head dim 64", DECODE, head_dim=64),
    attention("decode, head dim 256", DECODE, head_dim=256),
    attention("decode, 8 tokens", 8 * DECODE),
    attention("decode, 16 tokens", 16 * DECODE),
    attention("16 tokens, head dim 256", 16 * DECODE, head_dim=256),
    attention("decode, fp32", DECODE, EXACT=True),
    attention("prefill", PREFILL),
    attention("prefill, no mask", PREFILL, CAUSAL=False),
    attention("prefill, window", PREFILL, WINDOWED=True),
    attention("prefill, soft cap", PREFILL, CAPPED=True),
    attention("prefill, int8", PREFILL, INT8=True),
    attention("prefill, rBlocks of 128", PREFILL, size=128),
    attention("prefill, head dim 64", PREFILL, head_dim=64),
    attention("prefill, head dim 256", PREFILL, head_dim=256),
    attention("prefill, fp32", PREFILL, EXACT=True),
    Wanted("merge", merge_kernel, MERGE, 4, 3),
    Wanted("store_kv", store_kv_kernel, {**STORE, "R": 0}, 4, 3),
    Wanted("store_kv with RoPE", store_kv_kernel, {**STORE, "R": 128}, 4, 3),
    Wanted("apply_rope", rope_kernel, {"H": 32, "H_PADDED": 32, "R": 128, **HEAD}, 4, 3),
    *backward("backward"),
    *backward("backward, head dim 256", head_dim=256),
]


def build(wanted: Wanted) -> Built:
    names = wanted.kernel.arg_names
    types = {name: "constexpr" if name in wanted.constants else type_of(name, wanted.pool) for name in names}
    # What a launch would see: aligned pointers, strides in multiples of 16 elements.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or name.endswith("_stride") or name == "v_offset"
    }
    constants = {(names.index(name),): value for name, value in wanted.constants.items()}
    source = ASTSource(fn=wanted.kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": wanted.num_warps, "num_stages": wanted.num_stages}
    compiled = triton.compile(source, target=HOPPER, options=options)
    ptx = compiled.asm["ptx"]
    usage = resource_usage(compiled.asm["cubin"])
    in_flight = max((int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)), default=0)
    cores = next((name for name in ("wgmma", "mma.sync") if name in ptx), "none")
    shared = compiled.metadata.shared
    room = programs_per_sm(usage["REG"], shared, wanted.num_warps)
    return Built(wanted.name, usage["REG"], usage["STACK"] + usage["LOCAL"], shared, room, in_flight, cores)


def programs_per_sm(registers: int, shared_bytes: int, num_warps: int) -> int:
    """A warp gets registers in portions of 256."""
    if shared_bytes > SHARED_OF_A_PROGRAM:
        return 0
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(REGISTERS_OF_AN_SM // of_a_warp // num_warps, SHARED_OF_AN_SM // (shared_bytes + RESERVED_SHARED), 32)


def type_of(name: str, pool: str = "bf16") -> str:
    if name in FLOATS:
        return "fp32"
    if name in POINTERS_TO_INT64:
        return "*i64"
    if name in POINTERS_TO_FP32:
        return "*fp32"
    if name == "POOL" or (name == "Q" and pool == "fp32"):
        return f"*{pool}"
    return "*bf16" if name.isupper() else "i32"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """As NVIDIA's own tool reads it, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    function = printed.partition("Function")[2]
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", function)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that a kernel's name must hold")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, faults = [], []
    print(
        f"triton {triton.__version__}, sm_90; bf16, group 4, head dim 128, rBlocks of 64 tokens, causal, if not named"
    )
    print(f"{'kernel':<26}{'registers':>10}{'spilled':>9}{'shared':>9}{'per SM':>8}{'in flight':>11}  tensor cores")
    for wanted in (wanted for wanted in WANTED if re.search(args.only, wanted.name)):
        row = build(wanted)
        rows.append(row._asdict())
        print(f"{row.kernel:<26}{row.registers:>10}{row.spilled_bytes:>9}{row.shared_bytes:>9}{row.per_sm:>8}", end="")
        print(f"{row.copies_in_flight:>11}  {row.tensor_core}", flush=True)
        if row.spilled_bytes:
            faults.append(f"{row.kernel} spills {row.spilled_bytes} bytes of a thread")
        if wanted.is_pipelined and row.copies_in_flight < 2:
            faults.append(f"{row.kernel} does not load ahead")
        if row.per_sm < wanted.per_sm:
            faults.append(f"an SM has room for {row.per_sm} of {row.kernel}, the launch counts on {wanted.per_sm}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

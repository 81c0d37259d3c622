"""The kernels, compiled ahead of time for cards that are not here: `.ci/kernels` runs this with two versions of Triton.

    python .ci/compile_kernels.py [NAME ...]      those whose line begins with a NAME; all without

Kernels of logits, sm_90, with the blocks of the package's own tables, must have matrix products by wgmma which ptxas
does not serialise, operands by TMA, and no spilled register between the first and the last product. Row kernels must
compile for sm_80, sm_90 and sm_100 without a spill. Prints a line for each; the exit status is 1 if one is bad.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DEFAULT_FP_FUSION": "1"}

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from partial_fc.kernels import logits, rows
from partial_fc.kernels.choice import STREAM_WIDEST
from partial_fc.kernels.device import rows as row_kernels
from partial_fc.kernels.device import stream, tile

FLOATS = ("scale", "scale2", "lr", "b", "decay", "eps", "by_rate", "by_root")
WHOLE = (
    "N",
    "T",
    "per_split",
    "stride",
    "count",
    "start",
    "extras",
    "width",
    "grad_stride",
    "row_stride",
    "out_stride",
)
LONG = ("first_id", "key")
POINTERS = {"index": "*i64", "slot": "*i64", "low": "*bf16"}


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    blocks: dict[str, tuple[int, int]]  # of descriptors
    types: dict[str, str]  # of arguments that are not as their names say
    warps: int
    stages: int
    cards: tuple[int, ...]

    @property
    def name(self) -> str:
        numbers = " ".join(f"{k} {v}" for k, v in self.constants.items() if not isinstance(v, bool) and k != "LABELS")
        on = [k.lower() for k, v in self.constants.items() if v is True]
        labels = [f"{self.constants['LABELS']} labels"] if self.constants.get("LABELS", 1) > 1 else []
        return f"{self.kernel.__name__} {', '.join([numbers, *on, *labels])}"


PLAIN = {"LABELS": 1, "COLUMN": False, "ONLINE": False, "HARDEST": False}
ALL = {"LABELS": 2, "COLUMN": True, "ONLINE": True, "HARDEST": True}


def of_logits() -> Iterator[Case]:
    how = logits.TILE
    for D, options in (
        (512, {"STORE": True}), (512, {"STORE": False}), (512, {"STORE": True, **ALL}), (100, {"STORE": True}),
        (512, {"STORE": True, "SUMS": False}), (512, {"STORE": True, "SUMS": False, "SHIFTED": True, "COLUMN": True}),
    ):  # fmt: skip
        constants = {"SHIFTED": False, "SUMS": True, **PLAIN, **options, "D": D}
        constants |= {"BN": how.samples, "BC": how.rows, "BD": how.depth}
        blocks = {"X": (how.samples, how.depth), "W": (how.rows, how.depth)}
        blocks |= {"E": (how.samples, how.rows // 2)} if constants["STORE"] else {}
        yield Case(tile.tile_exponentials, constants, blocks, {"a": "i32"}, how.warps, how.stages, (90,))
    for D in (64, 100, 128, 200, 256, 512):
        wide = max(64, 1 << (D - 1).bit_length())
        served = D <= STREAM_WIDEST  # at 512 the simplest alone must do: gpu.py measures it
        for options in (PLAIN, ALL)[: 1 + served]:
            yield _stream(stream.stream_forward, D, wide, logits.STREAM[wide], options)
        without = {name: value for name, value in PLAIN.items() if name not in ("ONLINE", "HARDEST")}
        more = {"SHIFTED": True, "SUMS": True, "LABELS": 2, "COLUMN": True}
        for options in ({"SHIFTED": False, "SUMS": False}, more)[: 1 + served]:
            yield _stream(stream.stream_backward, D, wide, logits.STREAM_ROWS[wide], {**without, **options})


def _stream(kernel: Any, D: int, wide: int, how: logits.Blocks, options: dict[str, Any]) -> Case:
    constants = {**options, "D": D, "DP": wide, "BN": how.samples, "BC": how.rows}
    blocks = {"X": (how.samples, wide), "W": (how.rows, wide)}
    return Case(kernel, constants, blocks, {"a": "i32"}, how.warps, how.stages, (90,))


def of_rows() -> Iterator[Case]:
    for width in (512, 1024):
        how = rows.Blocks.of(width)
        blocks = {"BR": how.BR, "BD": how.BD, "GATHER": True}
        for kernel, options, types in (
            (row_kernels.gather_rows, {"NORMALISE": True}, {"out": "*bf16"}),
            (row_kernels.project_rows, {}, {}),
            (row_kernels.catch_up_rows, {**CATCH_UP, "STATE": True}, {"directions": "*bf16"}),
            (row_kernels.step_rows, {**STEP, "MOMENTUM": True}, {"a": "fp32"}),
            (row_kernels.step_rows, {**STEP, "MOMENTUM": True, "THROUGH": True}, {"a": "fp32", "grad": "*bf16"}),
            (row_kernels.step_rows, {**STEP, "ADAM": True, "LOW": True, "STOCHASTIC": True}, {"a": "fp32"}),
        ):
            here = {k: v for k, v in blocks.items() if k in kernel.arg_names}
            yield Case(kernel, {**here, **options}, {}, types, how.num_warps, 3, (80, 90, 100))


STEP = {"TAKEN": False, "ADAM": False, "MOMENTUM": False, "NESTEROV": False, "MAXIMIZE": False, "DECAY": True}
STEP |= {"DECOUPLED": False, "FACTORS": False, "LOW": False, "STOCHASTIC": False, "THROUGH": False}
CATCH_UP = {"NORMALISE": True, "BFLOAT16": False, "FLOAT16": False}


def compiled(case: Case, card: int) -> tuple[Any, str]:
    """Return (what was compiled, ptxas's log)."""
    known = dict.fromkeys(case.constants, "constexpr") | dict.fromkeys(WHOLE, "i32") | dict.fromkeys(FLOATS, "fp32")
    known |= dict.fromkeys(LONG, "i64") | POINTERS | case.types
    if case.kernel is not row_kernels.step_rows:
        known |= {"first": "*i32"}
    known |= {name: f"tensordesc<bf16[{r},{c}]>" for name, (r, c) in case.blocks.items()}
    types = {name: known.get(name, "*fp32") for name in case.kernel.arg_names}
    # as the launcher finds them; without it no load is asynchronous
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constants, attrs=aligned)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        options = {"num_warps": case.warps, "num_stages": case.stages}
        built = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    return built, log.getvalue()


def spills_between_products(cubin: bytes) -> int:
    """Return how many accesses to spilled registers stand between the first and the last matrix product."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(HGMMA|STL|LDL)\b", listing)
    products = [i for i, name in enumerate(found) if name == "HGMMA"]
    return sum(name != "HGMMA" for name in found[products[0] : products[-1]]) if products else 0


def look(case: Case, card: int) -> tuple[str, list[str]]:
    """Return (a line about a kernel, what is wrong with it)."""
    try:
        built, log = compiled(case, card)
    except Exception as error:  # whatever the compiler raises
        return "does not compile", [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"]
    ptx = built.asm["ptx"]
    registers = re.search(r"Used (\d+) registers", log)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))
    wgmma, tma = ptx.count("wgmma.mma_async"), len(re.findall(r"cp\.async\.bulk\.tensor", ptx))
    line = (
        f"{registers[1] if registers else '?'} registers, {spilled} bytes spilled, {built.metadata.shared // 1024} KiB"
    )
    if registers is None:
        return line, ["ptxas said nothing about registers"]
    if not case.blocks:
        return line, ["registers are spilled"] if spilled else []
    bad = [] if wgmma else ["no wgmma"]
    bad += [] if tma else ["no TMA"]
    bad += ["ptxas serialises wgmma"] if "C7515" in log or "serialized" in log else []
    bad += ["registers are spilled between products"] if spills_between_products(built.asm["cubin"]) else []
    return f"{line}, {wgmma} wgmma, {tma} TMA", bad


def main() -> int:
    triton.knobs.nvidia.dump_ptxas_log = True
    wrong = 0
    for case in (*of_logits(), *of_rows()):
        if sys.argv[1:] and not case.name.startswith(tuple(sys.argv[1:])):
            continue
        for card in case.cards:
            line, bad = look(case, card)
            wrong += bool(bad)
            print(
                f"{triton.__version__} sm_{card} {case.name}: {line}{''.join(f' FAIL: {b}' for b in bad)}", flush=True
            )
    print(f"{triton.__version__}: {wrong or 'nothing'} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

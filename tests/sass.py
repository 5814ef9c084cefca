"""What ptxas makes of Triton kernels for Hopper, read without a GPU: products whose operand's place nothing wrote."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)\s*(.*?);")
_WRITERS = ("U", "R2UR", "S2UR", "REDUX", "CS2UR", "VOTEU")  # instructions with uniform registers as results


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> str:
    """The kernel's SASS; arguments without a type are int32, and all numbers and pointers multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if kind[0] in "*i":
            attrs[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def products_of_nothing(sass: str) -> list[str]:
    """The products (HGMMA) that take a descriptor from a uniform register that no instruction writes; at least one
    product there must be."""
    written, products = set(), []
    for operation, text in _INSTRUCTION.findall(sass):
        operands = [each.strip() for each in text.split(",")]
        result = re.match(r"UR(\d+)", operands[0])
        if result and operation.startswith(_WRITERS):
            width = 4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1
            written |= set(range(int(result[1]), int(result[1]) + width))
        if operation.startswith("HGMMA"):
            products.append((operation, operands))
    assert products, "no product in it"
    found = []
    for operation, operands in products:
        width = 2 if operands[1].startswith("R") else 4  # one operand in registers, or both in shared memory
        first = int(re.search(r"gdesc\[UR(\d+)\]", " ".join(operands))[1])
        if not set(range(first, first + width)) <= written:
            found.append(f"{operation} {', '.join(operands)}")
    return found

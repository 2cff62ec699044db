"""What compilers make of the fused kernels, for GPUs that need not be there: `python -m eval.kernel_code`.

Each kernel is compiled as it would be launched for a layer of a full-size denoiser, by Triton and the assembler that
comes with it. Written to results/kernel-code.json: registers of a thread, its bytes that did not fit them (spills), shared
memory of a block, the tensor cores' instruction for products, and bytes of an asynchronous copy. Linux only, as Triton.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from eval.common.files import writable, write_json
from eval.common.programs import command_line
from eval.common.programs import run as run_program
from eval.common.provenance import command, versions
from eval.common.tables import markdown
from eval.cost.kernel_facts import Shape
from goca_guidance.method import kernels


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB of a block, by compute capability
PRODUCTS = {
    "wgmma.mma_async": "wgmma",
    "tcgen05.mma": "tcgen05",
    "mma.sync": "mma",
}  # on tensor cores, as PTX names them


HALF = torch.bfloat16
LAYERS: dict[str, tuple[Shape, torch.dtype]] = {
    "sd-1.5, 64": (Shape("sd-1.5", 8, 40, 64), HALF),
    "sd-1.5, 64, words": (Shape("sd-1.5", 8, 40, 64, 77, joint=False), HALF),
    "sd-1.5, 32": (Shape("sd-1.5", 8, 80, 32), HALF),
    "sd-1.5, 16": (Shape("sd-1.5", 8, 160, 16), HALF),
    "sd-1.5, 16, words": (Shape("sd-1.5", 8, 160, 16, 77, joint=False), HALF),
    "sd-1.5, 64, float32": (Shape("sd-1.5", 8, 40, 64), torch.float32),
    "sdxl, 64": (Shape("sdxl", 10, 64, 64), HALF),
    "sdxl, 64, words": (Shape("sdxl", 10, 64, 64, 77, joint=False), HALF),
    "pixart-sigma, 64": (Shape("pixart-sigma", 16, 72, 64), HALF),
    "pixart-sigma, 64, words": (Shape("pixart-sigma", 16, 72, 64, 300, joint=False), HALF),
    "flux, 64": (Shape("flux", 24, 128, 64, 512), HALF),
    "widest, 64": (Shape("widest", 8, 256, 64), HALF),
    "widest, 64, words": (Shape("widest", 8, 256, 64, 77, joint=False), HALF),
    "flux, 64, float32": (Shape("flux", 24, 128, 64, 512), torch.float32),
}


def launches(layer: Shape, dtype: torch.dtype) -> Iterator[tuple[kernels.Plan, list]]:
    """What a layer launches, and the tensors of each launch, without data."""
    found: list[tuple[kernels.Plan, list]] = []

    def note(plan, read, written, added=()):
        found.append((plan, [read[0] if x is None else x for x in (*read, *written, *added)]))

    record, empty = layer.record("meta", dtype), partial(torch.empty, device="meta")
    pixels = layer.side**2
    with patch.object(kernels, "launch", note):
        lse = kernels.log_sum_exp(record)
        if record.view.image.stop:
            reference = empty(1, pixels, pixels, dtype=dtype if dtype == torch.float32 else torch.float16)
            square = empty(1, pixels, pixels)
            slots = empty(pixels, dtype=torch.int64)
            kernels.pixels(record, lse, None, slots, reference, None, square)
        if layer.text:
            columns = empty(1, 10, dtype=torch.int64)
            zww = None if layer.joint else empty(1, pixels, layer.heads * layer.width, dtype=dtype)
            kernels.words(record, columns, zww=zww, lse=lse if layer.joint else None, total=layer.joint)
    return iter(found if layer.joint or not layer.text else found[1:])


def compiled(plan: kernels.Plan, tensors: list, capability: int) -> Any:
    """A launch's kernel, compiled as Triton does at its first launch, for a GPU of a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from goca_guidance.method import triton_kernels

    kernel, target = getattr(triton_kernels, plan.kernel), GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**plan.options, "debug": False}
    bound, specialised, options = bind(*tensors, *plan.numbers, **plan.constants, **options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialised, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)


def row(name: str, plan: kernels.Plan, tensors: list, capability: int) -> dict:
    """A row of the table."""
    made = compiled(plan, tensors, capability)
    used, code = _resources(made.asm["cubin"]), made.asm["ptx"]
    copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*?, (0x\w+)", code)]
    tile = f"{plan.constants['BM']} x {plan.constants['BN']}"
    return {
        "layer": name,
        "kernel": plan.kernel,
        "tile": f"{tile}, {plan.options['num_warps']} warps, {plan.options['num_stages']} stages",
        "sm": capability,
        "registers": used["REG"],
        "spills": used["STACK"],
        "shared_kb": round(made.metadata.shared / 1024, 1),
        "products": next((kind for op, kind in PRODUCTS.items() if op in code), "none"),
        "copies": min(copies, default=0),
    }


def _resources(binary: bytes) -> dict[str, int]:
    """What a compiled kernel takes, by cuobjdump: "REG:40 STACK:0 SHARED:0 LOCAL:0 ..."."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    words = (word.split(":") for word in told.split() if word.count(":") == 1)
    return {name: int(value) for name, value in words if value.isdigit()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--sm", nargs="+", type=int, default=[80, 90, 100], choices=list(SHARED))
    parser.add_argument("--result", type=Path, default=Path("results/kernel-code.json"))
    args = parser.parse_args(arguments)
    result = writable(args.result)
    tasks = [(name, *made, sm) for name in args.layers for made in launches(*LAYERS[name]) for sm in args.sm]
    rows = [row(*task) for task in tqdm(tasks, disable=None)]
    write_json(result, {"command": command(), "versions": versions(("torch", "triton")), "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    run_program(main)

"""Ask Triton's own AMD assembler whether it takes a block: no GPU, no emulation."""

import re
import tempfile
from pathlib import Path

LANES = 32


def _mnemonics(text: str) -> list[str]:
    return [part.split()[0] for part in re.split(r"[;\n]", text) if part.strip()]


def _kernel(text: str, constraints: str) -> str:
    """A Triton IR kernel: load every input, run the block, store every output."""
    parts = [part.strip() for part in constraints.split(",")]
    widths = [64 if re.search(rf"v_cvt_pk_f32_fp8(_e\d+)?\s+\${n}\b", text) else 32 for n in range(len(parts))]
    outputs = [f"tensor<{LANES}xi{w}>" for part, w in zip(parts, widths, strict=True) if part.startswith("=")]
    inputs = [f"tensor<{LANES}xi32>"] * (len(parts) - len(outputs))
    body = [f"%lane = tt.make_range {{end = {LANES} : i32, start = 0 : i32}} : tensor<{LANES}xi32>"]
    pointers = []
    for n, kind in enumerate(inputs + outputs):
        bits = kind.rstrip(">").rpartition("i")[2]
        pointer = f"!tt.ptr<i{bits}>"
        pointers.append(f"%a{n}: {pointer}")
        body += [
            f"%b{n} = tt.splat %a{n} : {pointer} -> tensor<{LANES}x{pointer}>",
            f"%p{n} = tt.addptr %b{n}, %lane : tensor<{LANES}x{pointer}>, tensor<{LANES}xi32>",
        ]
        if n < len(inputs):
            body.append(f"%x{n} = tt.load %p{n} : tensor<{LANES}x{pointer}>")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\0A")
    attributes = f'constraints = "{constraints}", packed_element = 1 : i32, pure = true'
    arguments, types = ", ".join(f"%x{n}" for n in range(len(inputs))), ", ".join(inputs)
    block = f'tt.elementwise_inline_asm "{escaped}" {{{attributes}}} {arguments} : {types} -> {", ".join(outputs)}'
    body.append(f"%y:{len(outputs)} = {block}")
    for n, kind in enumerate(outputs):
        bits = kind.rstrip(">").rpartition("i")[2]
        body.append(f"tt.store %p{len(inputs) + n}, %y#{n} : tensor<{LANES}x!tt.ptr<i{bits}>>")
    return "\n".join(["module {", f"tt.func public @block({', '.join(pointers)}) {{", *body, "tt.return", "}", "}\n"])


def assembles(text: str, constraints: str, arch: str) -> str | None:
    """None if a kernel holding this block compiles for `arch` ("gfx1201", "gfx1151") with all of it; else the reason.

    The assembler's own diagnosis goes to stderr.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "block.ttir"
        source.write_text(_kernel(text, constraints))
        try:
            compiled = triton.compile(str(source), target=GPUTarget("hip", arch, LANES), options={"num_warps": 1})
        except RuntimeError as error:
            return f"{arch} refuses {text!r}: {error}"
    _, start, rest = compiled.asm["amdgcn"].partition(";;#ASMSTART")
    inside, end, _ = rest.partition(";;#ASMEND")
    if not start or not end:
        return f"{arch}: the compiler dropped {text!r}"
    # Code only: ';' starts a comment, so that an instruction after it is silently not there.
    code = _mnemonics("\n".join(line.split(";")[0] for line in inside.split("\n")))
    return None if code == _mnemonics(text) else f"{arch} assembles {code} of {text!r}"

"""Triton's kernels compiled for a GPU that is not there, in a process of its own: in this one, Triton interprets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from tests.conftest import ROOT

COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource

module, name, signature, constants, aligned, options = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
signature |= dict.fromkeys(constants, "constexpr")
attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
source = ASTSource(kernel, signature, constants, attributes)
compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    command = [nvidia.replace("__init__.py", "bin/cuobjdump"), "-res-usage", file.name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
registers, stack, shared = (int(re.search(word + r":(\\d+)", said)[1]) for word in ("REG", "STACK", "SHARED"))
found = {"registers": registers, "stack": stack, "shared": max(shared, compiled.metadata.shared)}
print(json.dumps({**found, "ptx": compiled.asm["ptx"]}))
"""


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: Iterable[str] = (), **options: int
) -> dict[str, Any]:
    """Compile a kernel for an H100, and return what it takes: registers and bytes of stack of a thread, where registers
    spill to, and bytes of shared memory; and its PTX.

    Args:
        kernel: a function under `triton.jit`
        signature: the type of each argument that is not constant, as Triton writes it
        constants: the constant arguments
        aligned: names of arguments that are multiples of 16, which Triton sees in a call, and which lets it load more
            at once
        options: of Triton's compiler, as num_warps
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = json.dumps([kernel.fn.__module__, kernel.fn.__name__, signature, constants, list(aligned), options])
    command = [sys.executable, "-c", COMPILE, arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)

"""Builds fastbert._C with the package: CUDA where torch and nvcc are, its CPU part where torch and a C++ compiler are.

What is compiled, and with which flags, is in fastbert/extension.py; everything else about the package is in
pyproject.toml. `pip install .` builds in an isolated environment without torch, so it installs the pure Python package,
which compiles its extension at first use; `pip install --no-build-isolation .` sees torch and compiles. No GPU is asked
for anything: the architectures are those of TORCH_CUDA_ARCH_LIST, by default sm_80, sm_90 and PTX for what comes later.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

FACTS = runpy.run_path(str(Path(__file__).parent / "fastbert" / "extension.py"))
STABLE_ABI, CXX_FLAGS, NVCC_FLAGS, decide = (
    FACTS[name] for name in ("STABLE_ABI", "CXX_FLAGS", "NVCC_FLAGS", "decide")
)


def extension(part):
    """The arguments of setup() that build this part of fastbert._C."""
    from torch.utils import cpp_extension

    sources = [f"fastbert/csrc/{name}" for name in FACTS["SOURCES"][part]]
    arguments = {
        "define_macros": [*FACTS["MACROS"][part]],
        "extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        "depends": [f"fastbert/csrc/{path.name}" for path in sorted(FACTS["FOLDER"].glob("*.h"))],
        "py_limited_api": True,
    }
    if part == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", FACTS["CUDA_ARCHITECTURES"])
        module = cpp_extension.CUDAExtension("fastbert._C", sources, **arguments)
    else:
        module = cpp_extension.CppExtension("fastbert._C", sources, **arguments)

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # whatever a compiler can do wrong, the package works without its help
                say(f"NOT BUILT: {error}")
                self.extensions = self.distribution.ext_modules = []

    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}, "options": options}


def say(text):
    print(f"fastbert._C: {text}", file=sys.stderr)


if __name__ == "__main__":
    part, reason = decide()
    say(f"building the {part} part: {reason}" if part else f"not built: {reason}")
    setup(**(extension(part) if part else {}))

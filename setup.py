"""The compiled part, fastbert._C: CUDA where torch and nvcc are, its CPU part where torch and a C++ compiler are.

Everything else about the package is in pyproject.toml. `pip install .` builds in an isolated environment without torch,
so it installs the pure Python package; `pip install --no-build-isolation .` sees torch and compiles. No GPU is asked
for anything: the architectures are those of TORCH_CUDA_ARCH_LIST, by default sm_80, sm_90 and PTX for what comes later.
"""

import os
import shutil
import sys

from setuptools import setup

# PyTorch's stable ABI as of 2.10; with Python's limited API (py_limited_api below), one build serves every later torch
# and every later Python.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")
# No fast-math. sqrt sets no errno and nothing traps, which would keep the loops from being vector code; no product is
# fused with a sum, so that CPU and GPU round alike.
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
NVCC_FLAGS = ["-O3", "--fmad=false"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def decide():
    """Return (part, reason): which part of the extension to build, "cuda", "cpu" or None, and why."""
    try:
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        return None, f"torch cannot be imported here ({error})"
    home = cpp_extension.CUDA_HOME  # None where torch itself is built without CUDA
    if home and os.path.exists(os.path.join(home, "bin", "nvcc")):
        return "cuda", f"nvcc is in {home}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler):
        return "cpu", f"the compiler is {compiler}, and there is no nvcc or torch is built without CUDA"
    return None, f"there is no C++ compiler ({compiler})"


def extension(part):
    """The arguments of setup() that build this part of fastbert._C."""
    from torch.utils import cpp_extension

    sources = ["csrc/bindings.cpp", "csrc/lamb_cpu.cpp"]
    arguments = {
        "define_macros": [STABLE_ABI],
        "extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        "depends": ["csrc/lamb.h", "csrc/lamb_launch.h"],
        "py_limited_api": True,
    }
    if part == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        arguments["define_macros"] += [("USE_CUDA", None), ("FASTBERT_CUDA", None)]
        module = cpp_extension.CUDAExtension("fastbert._C", [*sources, "csrc/lamb.cu"], **arguments)
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

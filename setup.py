"""Compiles the CPU kernels; everything else about the package is in pyproject.toml.

One library per instruction set, so that no function of the one can be linked into the other. They need a C++17
compiler with OpenMP and nothing else. Where there is none the package installs without them, and torch computes.
"""

import os
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path("workers/kernels/cpu/native")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512VBMI = [*AVX512, "-mavx512vbmi"]
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vbmi": AVX512VBMI,
    "avx512bf16": [*AVX512VBMI, "-mavx512bf16"],
}
# GCC 12's own intrinsics look uninitialised to it.
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class BuildApart(build_ext):
    """Each library has a folder of its own for object files: they have the same names, and are made at once."""

    def build_extension(self, ext):
        apart = copy(self)
        apart.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(apart, ext)


setup(
    cmdclass={"build_ext": BuildApart},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=[
        Extension(
            f"workers.kernels.cpu.native_{name}",
            sources=sorted(str(file) for file in SOURCE_DIR.glob("*.cpp")),
            depends=sorted(str(file) for file in SOURCE_DIR.glob("*.h")),
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
)

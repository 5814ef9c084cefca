"""Builds the package and its compiled ops (`csrc/`, module `megalora._C`) against the installed torch.

pip install --no-build-isolation -e .                              needs torch and a C++ compiler
MEGALORA_BUILD_EXTENSION=0 pip install --no-build-isolation -e .   needs neither; the torch references serve
"""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
COMPILE_FLAGS = [
    "-O3",
    "-fopenmp",  # at::parallel_for is OpenMP code in a header
    "-ffp-contract=off",  # a·b + c rounds the same on each instruction set; kernels that want fma say so
    "-fno-trapping-math",  # lets selections of floats be vectorised; results are the same
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
]


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "megalora/__init__.py").read_text(), re.MULTILINE)[1]


def compiled_ops() -> dict:
    """The `setup` arguments that build every csrc/*.cpp into one module, or none if that is switched off."""
    if os.environ.get("MEGALORA_BUILD_EXTENSION", "1") == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError:
        sys.exit(
            "megalora builds its ops against an installed torch, and there is none: pip install torch, then "
            "pip install --no-build-isolation . (MEGALORA_BUILD_EXTENSION=0 skips the build)"
        )
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    extension = CppExtension("megalora._C", sources, extra_compile_args=COMPILE_FLAGS, extra_link_args=["-fopenmp"])
    extension.depends = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="megalora",
    version=version(),
    description="LoRA fine-tuning with tensor, pipeline and data parallelism, alike on every layout",
    packages=find_packages(include=["megalora", "megalora.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",
        "transformers>=4.51",
        "safetensors",
        "sentencepiece",
        "protobuf",
        "tensorboard",
        "rich",
        "pyyaml",
    ],
    extras_require={
        "demo": ["gguf"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "peft", "ruff"],
    },
    entry_points={"console_scripts": ["megalora = megalora.cli:main"]},
    **compiled_ops(),
)

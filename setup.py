"""Builds the package and its compiled ops (`csrc/`, module `megalora._C`) against the installed torch.

pip install --no-build-isolation -e .                              builds them where torch and a C++ compiler are
pip install .                                                      has no torch to build against: references serve
MEGALORA_BUILD_EXTENSION=0 pip install --no-build-isolation -e .   needs neither; the torch references serve
MEGALORA_BUILD_EXTENSION=cpu pip install --no-build-isolation -e . no CUDA kernels

CUDA kernels are built where torch is a CUDA build and a CUDA toolkit is there: for sm_80 and sm_90, with PTX for later
GPUs.
"""

import os
import re
import runpy
import shutil
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
CUDA_FLAGS = [
    "-O3",
    "--extended-lambda",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]

SERVE = ["starlette>=0.40", "uvicorn>=0.30", "prometheus-client"]


def version(built: str) -> str:
    """built: what the compiled ops are for, "cpu" or "cuda"; "": there are none. `make wheel` names wheels by it."""
    plain = re.search(r'^__version__ = "(.+)"$', (ROOT / "megalora/__init__.py").read_text(), re.MULTILINE)[1]
    if not built or os.environ.get("MEGALORA_WHEEL") != "1":
        return plain
    import torch

    return f"{plain}+torch{re.match(r'[0-9.]*[0-9]', torch.__version__)[0]}.{built}"


def without_ops(why: str) -> tuple[dict, str]:
    """Go on without the compiled ops, and say what that costs."""
    print(
        f"megalora is installed without its compiled ops ({why}): attention, LoRA products, norms and dropout run in "
        "plain torch, with the same numbers, slower. To build them: pip install torch; "
        "pip install --no-build-isolation .",
        file=sys.stderr,
    )
    return {}, ""


def note_sources(folder: Path) -> Path:
    """Writes a digest of csrc/ into a header in `folder`, which library.cpp includes; returns the header.

    A macro for all files would compile all of them again for a change of one. Where the digest is there already the
    header stays as old as it is.
    """
    digest = runpy.run_path(str(ROOT / "megalora/ops/sources.py"))["digest"]  # megalora.ops would import torch
    header, text = folder / "megalora_sources.h", f'#define MEGALORA_SOURCES "{digest(ROOT / "csrc")}"\n'
    if not header.exists() or header.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header


def compiled_ops() -> tuple[dict, str]:
    """The `setup` arguments that build csrc/ into one module, and what for; none if that is switched off or cannot be.
    """
    asked = os.environ.get("MEGALORA_BUILD_EXTENSION")
    wanted = asked or "1"
    if wanted not in ("0", "1", "cpu"):
        sys.exit(f"MEGALORA_BUILD_EXTENSION is {wanted!r}: give 0 (no compiled ops), cpu (no CUDA kernels) or 1")
    if wanted == "0":
        return {}, ""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:  # CXX may have a launcher before it, or options behind
        if asked is None:
            return without_ops(f"there is no C++ compiler {compiler}")
        sys.exit(f"no C++ compiler {compiler}: install one, or set CXX (MEGALORA_BUILD_EXTENSION=0 skips the build)")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError:
        if asked is None:
            return without_ops("there is no torch to build them against")
        sys.exit(
            "megalora builds its ops against an installed torch, and there is none: pip install torch, then "
            "pip install --no-build-isolation . (MEGALORA_BUILD_EXTENSION=0 skips the build)"
        )

    class Build(BuildExtension):
        """Tells the library which sources it is built from."""

        def build_extensions(self):
            header = note_sources(Path(self.build_temp).resolve())
            self.compiler.add_include_dir(str(header.parent))
            for extension in self.extensions:
                extension.depends.append(str(header))  # without ninja, only what is older than one of these is built
            super().build_extensions()

    cuda = wanted == "1" and torch.version.cuda is not None and CUDA_HOME is not None
    patterns = ["*.cpp", "cpu/*.cpp"] + ["cuda/*.cpp", "cuda/*.cu"] * cuda
    sources = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    flags = {"cxx": COMPILE_FLAGS + ["-DMEGALORA_CUDA"] * cuda, "nvcc": CUDA_FLAGS}
    kind = CUDAExtension if cuda else CppExtension
    extension = kind(
        "megalora._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],  # its headers are named from there
        extra_compile_args=flags if cuda else COMPILE_FLAGS,
        extra_link_args=["-fopenmp"],
    )
    extension.depends = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}, "cuda" if cuda else "cpu"


OPS, BUILT_FOR = compiled_ops()
setup(
    name="megalora",
    version=version(BUILT_FOR),
    description="LoRA fine-tuning with tensor, pipeline and data parallelism, alike on every layout",
    packages=find_packages(include=["megalora", "megalora.*"]),
    package_data={"megalora.web": ["static/*"], "megalora.recipes": ["*.yaml"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",
        "transformers>=4.51",
        "safetensors",
        "sentencepiece",
        "protobuf",
        "tensorboard",
        "jinja2>=3.1.6",  # older sandboxes have known escapes
        "numpy",
        "rich",
        "pyyaml",
        "regex",
    ],
    extras_require={
        "data": ["pyarrow", "zstandard", "datasets>=4"],  # parquet and arrow, .zst, datasets saved to disk
        "demo": ["gguf"],
        "images": ["pillow"],  # models that read images (blip-2)
        "plots": ["matplotlib"],  # metrics.png at the end of a run
        "serve": SERVE,  # also megalora board
        "trackers": ["wandb", "mlflow", "swanlab"],  # --report_to
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "peft",
            "openai",
            "pillow",
            *SERVE,
            "ruff",
            "mypy>=2",
            "types-PyYAML",
            "clang-format==23.1.5",
        ],
    },
    entry_points={"console_scripts": ["megalora = megalora.cli:main"]},
    **OPS,
)

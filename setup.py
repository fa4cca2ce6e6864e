"""Finds the packages, and builds the CPU kernels (kernels/cpu) as a plain shared library: no torch, no Python API, a
file per instruction set.

Everything else about the package stands in pyproject.toml. Without a C++ compiler the install succeeds all the same,
and torch's reference kernels serve. CXX names the compiler.
"""

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Folders of the project's root that are rooms of the package
ROOMS_AT_THE_ROOT = ("kernels", "launch")
CONFIGS = "megatron_distkv.configs"
# No Python in them: data under packages' names
DATA = (
    CONFIGS, *(f"{CONFIGS}.{folder.name}" for folder in sorted(Path("configs").iterdir()) if folder.is_dir()),
    "megatron_distkv.ledger.scripts", "megatron_distkv.training.prose",
)  # fmt: skip
SOURCES = Path("kernels/cpu")
FLAGS = (
    "-std=gnu++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra -Wno-psabi"
)
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# GCC 12 warns of its own AVX-512 header.
AVX512 = f"{AVX512} -Wno-uninitialized -Wno-maybe-uninitialized"
# Only these files may hold instructions beyond the baseline; dispatch.cpp chooses among them at run time.
ISA_FLAGS = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vnni"}


class BuildKernels(build_ext):
    """One shared library of a fixed name, whatever this Python is called."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            compile_kernels(target, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            raise CompileError(f"{error}: torch's reference kernels will serve") from error


class AnyPythonWheel(bdist_wheel):
    """The library is loaded by ctypes: one wheel per platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_kernels(target: Path, objects: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [path for path in sorted(SOURCES.glob("*.cpp")) if is_x86 or path.stem not in ISA_FLAGS]
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        built = str(objects / f"{source.stem}.o")
        flags = shlex.split(f"{FLAGS} {ISA_FLAGS.get(source.stem, '')}")
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", built], check=True)
        return built

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(compile_one, sources))
    runtime = ["-static-libstdc++", "-static-libgcc", "-pthread", "-Wl,--exclude-libs,ALL", "-s"]
    # Under another name first: a process that has the old library mapped keeps it whole.
    fresh = target.with_suffix(".new")
    subprocess.run([*compiler, "-shared", *built, *runtime, "-o", str(fresh)], check=True)
    fresh.replace(target)


def packages() -> list[str]:
    """All that have an __init__.py, wherever they lie."""
    found = find_packages(include=["megatron_distkv", "megatron_distkv.*"])
    for room in ROOMS_AT_THE_ROOT:
        found += [f"megatron_distkv.{room}", *(f"megatron_distkv.{room}.{inner}" for inner in find_packages(room))]
    return [*found, *DATA]


setup(
    packages=packages(),
    package_dir={f"megatron_distkv.{room}": room for room in ROOMS_AT_THE_ROOT} | {CONFIGS: "configs"},
    ext_modules=[Extension("megatron_distkv.kernels.cpu.libdistkv_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)

"""The kernel `latticode.kernels._native`, and the tags of its wheels; everything else stands in pyproject.toml.

The kernel holds no Python: it is loaded by address (kernels/native.py), so one wheel of a platform serves every Python
from 3.11 on, under a name without the interpreter's version. The environment variable LATTICODE_NATIVE says what a
build does about it: 1 fails without a compiler, 0 leaves it out (the pure wheel), and unset takes it where it compiles.
Without the kernel the same functions run in PyTorch. The readme is README.md with links that the index can follow.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("LATTICODE_NATIVE", "")
if WANTED not in ("", "0", "1"):
    sys.exit(f"LATTICODE_NATIVE must be 0, 1 or unset, got {WANTED!r}")

# No contraction to fused multiply-add: a value has the same bits at every place of every layout.
GNU = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
MSVC = ["/O2", "/fp:precise", "/std:c11"]


FILES = "https://github.com/latticode/latticode/blob/main/"
PICTURES = "https://raw.githubusercontent.com/latticode/latticode/main/"


def absolute(page: str) -> str:
    """`page` with the links between files of the repository as addresses, which the package index can follow."""

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        return f"{picture}[{text}]({PICTURES if picture else FILES}{target})"

    page = re.sub(r'(src|srcset)="(?!https?:|#)([^"]+)"', rf'\1="{PICTURES}\2"', page)
    return re.sub(r"(!?)\[([^\[\]]*)\]\((?!https?:|mailto:|#)([^()\s]+)\)", link, page)


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".pyd" if sys.platform == "win32" else ".so")

    def build_extension(self, ext: Extension) -> None:
        ext.extra_compile_args = MSVC if self.compiler.compiler_type == "msvc" else GNU
        super().build_extension(ext)


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


native = Extension(
    "latticode.kernels._native",
    ["src/latticode/kernels/native.c"],
    optional=WANTED != "1",
    libraries=[] if sys.platform == "win32" else ["m"],
)
setup(
    long_description=absolute((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    ext_modules=[] if WANTED == "0" else [native],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)

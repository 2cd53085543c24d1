"""Setup of the packages, which are used in place.

`pip install --editable .` compiles nothing. `python3 setup.py build_ext --inplace` builds the kernel libraries and the
NumPy binding into operator_cxx/; operator_cxx/build.py documents the environment variables.
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

FOLDER = Path("operator_cxx")


def build_kernels() -> None:
    """Build the kernel libraries, or exit with a message."""
    from operator_cxx.build import BuildError, NoCompilerError, build_all

    try:
        for line in build_all():
            print(line)
    except BuildError as error:
        if isinstance(error, NoCompilerError):
            print(f"operators not built, plain torch is used, slower: {error}", file=sys.stderr)
            sys.exit(NoCompilerError.STATUS)
        sys.exit(f"operators not built: {error}")


def numpy_binding() -> list[Extension]:
    """Return the extension numpy_ops, linked to the CPU library; none if it is up to date or cannot be built."""
    from operator_cxx.build import compiler, library_path, source_hash

    target = FOLDER / f"numpy_ops{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists() and source_hash().encode() in target.read_bytes():
        print(f"{target}: up to date")
        return []
    try:
        from Cython.Build import cythonize
    except ImportError:
        print("NumPy binding not built: pip install cython")
        return []
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        print("NumPy binding not built: Python's headers are missing (Debian: apt-get install python3-dev)")
        return []
    for name in ("CC", "CXX"):  # the compiler of the kernels
        os.environ[name] = " ".join(compiler())
    beside = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    extension = Extension(
        "operator_cxx.numpy_ops",
        [str(FOLDER / "numpy_ops.pyx")],
        language="c++",
        include_dirs=[str(FOLDER / "include")],
        define_macros=[("NK_SOURCES", f'"{source_hash()}"')],
        extra_objects=[str(library_path("cpu"))],
        extra_link_args=[f"-Wl,-rpath,{beside}/{library_path('cpu').parent.name}"],
    )
    print(f"{target}: building")
    return cythonize([extension], build_dir="build", force=True, quiet=True)


if "build_ext" in sys.argv:
    os.chdir(Path(__file__).parent)
    build_kernels()
setup(
    packages=find_namespace_packages(include=["config*", "core*", "models*", "operator_cxx*", "symbol*", "utils*"]),
    ext_modules=numpy_binding() if "build_ext" in sys.argv else [],
    options={"build_ext": {"force": True}},  # numpy_binding returns only what is out of date
)

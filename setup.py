"""Build the extensions, one per concept of vfiodma/_core, over a static library of the C kernels in csrc."""
import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SANITIZE = os.environ.get("VFIODMA_SANITIZE")       # e.g. "address,undefined"
CFLAGS = ["-std=c11", "-O3", "-g1", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread", "-D_GNU_SOURCE"]
# What Cython's generated code, not ours, trips over.
GENERATED = ["-Wno-unused-function", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-sign-compare",
             "-Wno-cast-function-type", "-Wno-deprecated-declarations", "-Wno-unused-variable"]
LDFLAGS = ["-pthread"]
if SANITIZE:
    CFLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1"]
    LDFLAGS += [f"-fsanitize={SANITIZE}"]

DIRECTIVES = {
    "language_level": 3, "boundscheck": False, "wraparound": False, "initializedcheck": False, "cdivision": True,
    "embedsignature": True, "freethreading_compatible": True,
}


KERNELS = sorted(glob("csrc/*.c"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


class BuildExtensions(build_ext):
    """Extensions side by side, after the library; each takes from that what it needs."""

    def initialize_options(self):
        super().initialize_options()
        self.parallel = len(os.sched_getaffinity(0))

    def run(self):
        """Build the library first, also when nothing but extensions was asked for."""
        self.run_command("build_clib")
        super().run()


def extension(path):
    name = os.path.basename(path).removesuffix(".pyx")
    return Extension(f"vfiodma._core.{name}", [path], include_dirs=["csrc"], depends=KERNELS + HEADERS,
                     extra_compile_args=CFLAGS + GENERATED, extra_link_args=LDFLAGS)


# No -march=native: kernels choose their CPU variant at run time.
setup(libraries=[("vfiodma_kernels", {"sources": KERNELS, "include_dirs": ["csrc"], "obj_deps": {"": HEADERS},
                                      "cflags": CFLAGS})],
      ext_modules=cythonize([extension(path) for path in sorted(glob("vfiodma/_core/*.pyx"))],
                            compiler_directives=DIRECTIVES, build_dir="build/cython"),
      cmdclass={"build_ext": BuildExtensions})

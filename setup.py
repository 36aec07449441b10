"""Build the extensions: one per concept of vfiodma/_core, each with the C kernels that it needs."""
import os

from Cython.Build import cythonize
from setuptools import Extension, setup

# Which C files each extension is linked with.  No -march=native: kernels choose their CPU variant at run time.
KERNELS = {
    "errno": [],
    "rangemap": ["rangemap", "vaddrindex"],
    "iova": ["gaps", "iovaspace", "rangemap"],
    "bitmap": ["bitmap", "bitmap_x86", "bitmap_arm", "dirtylog"],
    "copy": ["copy"],
    "memory": ["usercopy"],
    "maprows": ["maprows"],
    "dirty": ["bitmap", "bitmap_x86", "bitmap_arm", "usercopy", "rangemap"],
    "nesting": ["pagewalk", "rangemap", "usercopy", "pin"],
    "mappings": ["rangemap", "usercopy", "pin", "memlock"],
    "attach": ["rangemap"],
    "pinning": ["rangemap", "usercopy", "pin"],
    "ioctl": ["usercopy", "rangemap"],
    "ioas_objects": [],
    "ioas_pages": ["pin", "usercopy", "memlock"],
    "ioas_dirty": ["usercopy", "rangemap"],
    "ioas": ["rangemap"],
    "hwpt": ["rangemap"],
    "ioas_access": ["rangemap", "usercopy"],
    "ioas_compat": ["rangemap", "usercopy"],
    "ioas_ioctl": ["rangemap", "usercopy", "memlock"],
    "ioas_context": ["rangemap"],
    "dma": ["dirtylog", "bitmap", "bitmap_x86", "bitmap_arm", "rangemap"],
    "type1": ["rangemap"],
    "tce": ["pin", "usercopy", "memlock"],
    "kernel": [],
    "userfault": ["pagemap", "missing", "pagehash", "bitmap", "bitmap_x86", "bitmap_arm"],
    "pagefile": ["pagefile", "pagehash", "copy"],
    "iommufd": ["rangemap", "bitmap", "bitmap_x86", "bitmap_arm"],
}

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


def headers():
    return [os.path.join(folder, name) for folder, _, names in os.walk("csrc") for name in names if name.endswith(".h")]


def extension(name, kernels):
    return Extension(
        f"vfiodma._core.{name}", [f"vfiodma/_core/{name}.pyx", *(f"csrc/{kernel}.c" for kernel in kernels)],
        include_dirs=["csrc"], depends=headers(), extra_compile_args=CFLAGS + GENERATED, extra_link_args=LDFLAGS)


present = {name: kernels for name, kernels in KERNELS.items() if os.path.exists(f"vfiodma/_core/{name}.pyx")}
setup(ext_modules=cythonize([extension(name, kernels) for name, kernels in present.items()],
                            compiler_directives=DIRECTIVES, build_dir="build/cython"))

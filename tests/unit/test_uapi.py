"""The ABI declarations agree with tests/data/uapi-layouts.json, entry by entry and in both directions.

The data was read from the debug information of compiled kernel headers.  Its ``i386`` offsets are not declared: only
64-bit machines are supported, and csrc/uapi refuses to compile elsewhere.
"""
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vfiodma.uapi import iommu, iommufd, layout, vfio
from vfiodma.uapi.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
DATA = json.loads((ROOT / "tests/data/uapi-layouts.json").read_text())
MODULES = (vfio, iommu, iommufd)
# Names of our own, beside the kernel's.
OURS = {"ENUMS", "OLDER_VALUES", "constant_at", "Layout", "at_kernel", "io", "iommu"}
# Which kernel to ask for to get what a source shows.  The founding vSVA header stands on a 6.1 one.
KERNEL = {"founding-5.2": "5.4", "founding-vsva-v11": "6.1", "linux-6.1": "6.1", "linux-6.12": "6.12",
          "linux-7.2": "7.2"}
SCALARS = ("u8", "u16", "u32", "u64", "s32", "le64", "ptr")
ABSENT = object()


def declared():
    """Everything our modules declare, by name; a name must have one home."""
    names = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name in OURS or re.fullmatch(r"__[a-z]+__", name):
                continue
            assert name not in names, f"{name} is declared twice"
            names[name] = value
    return names


NAMES = declared()
ENUMS = {name: members for module in MODULES for name, members in getattr(module, "ENUMS", {}).items()}
COMPILER = next(filter(shutil.which, ("gcc", "clang", "cc")), None)


def of_kind(kind):
    return {name: value for name, value in NAMES.items() if isinstance(value, kind)}


def expected_field(entry):
    length = entry["array"][0] if "array" in entry else None
    return layout.Field(
        name=entry["name"], offset=entry["offset"], size=entry["size"], type=entry["type"], length=length,
        element_size=entry.get("element_size") or entry["size"] // (length or 1),
        flexible=entry.get("flexible", False), union_member=entry.get("union_member", False))


def assert_form(form, entry):
    assert form.size == entry["size"]
    assert list(form.fields) == [expected_field(field) for field in entry["fields"]]


def u32_or_value(entry):
    return entry.get("u32", entry["value"])


def test_data_holds_only_what_these_tests_know():
    assert set(DATA) == {"format", "abi", "sources", "structs", "constants", "enums", "strings", "ioctls"}
    assert set(DATA["sources"]) == set(KERNEL)
    fields = [f for s in DATA["structs"].values() for form in [s, *s.get("variants", [])] for f in form["fields"]]
    assert {key for f in fields for key in f} == {
        "name", "offset", "size", "type", "array", "flexible", "element_size", "union_member"}
    assert all(len(f["array"]) == 1 for f in fields if "array" in f)
    assert {key for c in DATA["constants"].values() for key in c} == {"value", "in_sources", "u32", "by_source"}
    assert all("value" in c for c in DATA["constants"].values())


@pytest.mark.parametrize("name", DATA["structs"])
def test_struct_has_the_kernel_layout(name):
    form = NAMES.get(name, ABSENT)
    assert isinstance(form, Layout), f"{name} is not declared"
    assert form.name == name
    assert_form(form, DATA["structs"][name])


@pytest.mark.parametrize("name", [name for name, s in DATA["structs"].items() if "variants" in s])
def test_struct_can_be_had_as_each_source_shows_it(name):
    variants = DATA["structs"][name]["variants"]
    for variant in variants:
        for source in variant["sources"]:
            assert_form(NAMES[name].at(KERNEL[source]), variant)
    assert len(NAMES[name].older) == len(variants) - 1


@pytest.mark.parametrize("name", [name for name, s in DATA["structs"].items() if "variants" not in s])
def test_struct_that_never_changed_has_no_older_form(name):
    assert NAMES[name].older == {}
    assert NAMES[name].at("5.4") is NAMES[name].at("7.2") is NAMES[name]


@pytest.mark.parametrize("name", DATA["constants"])
def test_constant_has_the_kernel_value(name):
    value = NAMES.get(name, ABSENT)
    assert type(value) is int, f"{name} is not declared"
    assert value == u32_or_value(DATA["constants"][name])
    assert value & 0xffffffff == DATA["constants"][name]["value"] & 0xffffffff


def test_constants_that_grew_can_be_had_as_each_source_shows_them():
    grown = {name: c["by_source"] for name, c in DATA["constants"].items() if "by_source" in c}
    assert set(vfio.OLDER_VALUES) == set(grown)
    for name, values in grown.items():
        for source, value in values.items():
            assert vfio.constant_at(name, KERNEL[source]) == value, (name, source)
    assert vfio.constant_at("VFIO_PCI_NUM_IRQS", "5.4") == 5


@pytest.mark.parametrize("name", DATA["ioctls"])
def test_ioctl_has_the_kernel_number(name):
    entry = DATA["ioctls"][name]
    value = NAMES.get(name, ABSENT)
    assert type(value) is int, f"{name} is not declared"
    assert (value, hex(value), value >> 8, value & 0xff) == (entry["value"], entry["hex"], entry["type"], entry["nr"])


def test_enums_are_the_kernels():
    assert DATA["enums"] == ENUMS
    for members in ENUMS.values():
        for name, value in members.items():
            assert NAMES[name] == value


def test_strings_are_the_kernels():
    assert of_kind(str) == DATA["strings"]


def test_nothing_else_is_declared():
    assert set(of_kind(Layout)) == set(DATA["structs"])
    assert set(of_kind(int)) == set(DATA["constants"]) | set(DATA["ioctls"])
    assert set(NAMES) == set(of_kind(Layout)) | set(of_kind(int)) | set(of_kind(str))


def test_minimum_sizes_of_iommufd_arguments_that_grew():
    grown = {name: form.minimum for name, form in of_kind(Layout).items() if form.minimum != form.size}
    assert grown == {"iommu_hwpt_alloc": 24, "iommu_hw_info": 32, "iommu_viommu_alloc": 24, "iommu_veventq_alloc": 28}


# -- what a Layout does

def test_pack_and_unpack_round_trip_and_fill_with_zero():
    packed = vfio.vfio_iommu_type1_dma_map.pack(argsz=32, flags=3, vaddr=2**64 - 4096, iova=1 << 40)
    assert packed == struct.pack("=IIQQQ", 32, 3, 2**64 - 4096, 1 << 40, 0)
    assert vfio.vfio_iommu_type1_dma_map.unpack(packed) == {
        "argsz": 32, "flags": 3, "vaddr": 2**64 - 4096, "iova": 1 << 40, "size": 0}


def test_padding_inside_a_struct_is_kept():
    packed = vfio.vfio_eeh_pe_op.pack(argsz=40, op=9, err={"type": 1, "mask": 7})
    assert packed == struct.pack("=IIIxxxxIIQQ", 40, 0, 9, 1, 0, 0, 7)
    assert vfio.vfio_eeh_pe_op.unpack(packed)["err"] == {"type": 1, "func": 0, "addr": 0, "mask": 7}


def test_pack_into_writes_only_what_is_given():
    buffer = bytearray(b"\xff" * 40)
    vfio.vfio_iommu_type1_dma_map.pack_into(buffer, 8, iova=0)
    assert buffer == b"\xff" * 24 + bytes(8) + b"\xff" * 8


def test_flexible_array_is_appended_and_read_by_count():
    form = vfio.vfio_iommu_type1_info_cap_iova_range
    ranges = ({"start": 0, "end": 0xfedfffff}, {"start": 0xfef00000, "end": 2**39 - 1})
    packed = form.pack(header={"id": 1, "version": 1}, nr_iovas=2, iova_ranges=ranges)
    assert len(packed) == 16 + 2 * 16
    assert form.unpack(packed, count=2)["iova_ranges"] == ranges
    assert form.unpack(packed)["iova_ranges"] == ()
    assert vfio.vfio_irq_set.unpack(vfio.vfio_irq_set.pack(data=b"\1\0\1"), count=3)["data"] == b"\1\0\1"


def test_members_of_a_named_union_are_nested():
    form = iommu.iommu_cache_invalidate_info
    packed = form.pack(argsz=56, granu={"addr_info": {"addr": 4096, "nb_granules": 2}})
    assert packed[16 + 16:16 + 24] == (4096).to_bytes(8, sys.byteorder)
    assert form.unpack(packed)["granu"]["addr_info"]["nb_granules"] == 2
    with pytest.raises(TypeError):
        form.pack(granu={"other": 1})


def test_two_values_for_the_same_bytes_are_refused():
    with pytest.raises(ValueError, match="shares its bytes"):
        vfio.vfio_pci_dependent_device.pack(group_id=1, devid=1)
    assert vfio.vfio_pci_dependent_device.unpack(b"\1\0\0\0\0\0\0\0")["devid"] == int.from_bytes(
        b"\1\0\0\0", sys.byteorder)


@pytest.mark.parametrize("values, error", [
    ({"nonsense": 1}, TypeError), ({"argsz": -1}, struct.error), ({"argsz": 2**32}, struct.error),
    ({"argsz": "1"}, struct.error)])
def test_bad_values_are_refused(values, error):
    with pytest.raises(error):
        vfio.vfio_group_status.pack(**values)


def test_short_buffers_and_wrong_lengths_are_refused():
    with pytest.raises(struct.error):
        vfio.vfio_group_status.unpack(b"\0" * 7)
    with pytest.raises(struct.error):
        vfio.vfio_irq_set.unpack(b"\0" * 21, count=2)
    with pytest.raises(ValueError, match="takes 6 elements"):
        iommu.iommu_cache_invalidate_info.pack(padding=b"\0")


def test_little_endian_words_do_not_follow_the_machine():
    assert iommufd.iommu_hwpt_arm_smmuv3.pack(ste=(1, 2)) == b"\1" + bytes(7) + b"\2" + bytes(7)


def test_older_form_is_the_last_one_known_to_reach_that_kernel():
    assert [vfio.vfio_device_info.at(k).size for k in ("5.2", "5.4", "5.12", "6.1", "6.2", "7.2", "8.0")] == [
        16, 16, 20, 20, 24, 24, 24]
    assert vfio.vfio_device_bind_iommufd.at("6.12").pack(argsz=16, iommufd=-1) == struct.pack("=IIiI", 16, 0, -1, 0)


@pytest.mark.parametrize("name", DATA["structs"])
def test_numpy_dtype_has_the_same_places(name):
    form = NAMES[name]
    assert form.dtype.itemsize == form.size
    places = {n: (offset, dtype.itemsize) for n, (dtype, offset, *_) in form.dtype.fields.items()}
    assert places == {f.name: (f.offset, f.size) for f in form.fields if not f.flexible and f.type != "union"}


@pytest.mark.parametrize("name", DATA["structs"])
def test_every_byte_pattern_survives_where_there_is_a_field(name):
    form = NAMES[name]
    data = bytes(range(1, form.size + 1))
    values = form.unpack(data)
    copy = bytearray(form.size)
    for field_name, value in values.items():
        if isinstance(value, dict) and form[field_name].type == "union":
            for member, inner in value.items():
                form.pack_into(copy, **{field_name: {member: inner}})
        else:
            form.pack_into(copy, **{field_name: value})
    covered = {i for f in form.fields for i in range(f.offset, f.offset + f.size)}
    # Holes inside nested structures are zero in the copy; elsewhere every byte of a field comes back.
    assert all(copy[i] in (data[i], 0) for i in covered)
    assert all(copy[i] == data[i] for f in form.fields if f.type in SCALARS for i in range(f.offset, f.offset + f.size))


def test_uapi_does_not_import_numpy():
    code = "import sys, vfiodma.uapi.vfio, vfiodma.uapi.iommufd; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -- the C headers

HEADERS = sorted((ROOT / "csrc/uapi").glob("*.h"))


@pytest.fixture(scope="module")
def c_view(tmp_path_factory):
    """What tests/c/uapi_layouts.c prints: kind -> list of split lines."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("uapi")
    names = folder / "names.inc"
    names.write_text("".join(f"CONSTANT({n})\n" for n in [*DATA["constants"], *DATA["ioctls"]])
                     + "".join(f"STRING({n})\n" for n in DATA["strings"]))
    program = folder / "uapi_layouts"
    subprocess.run([COMPILER, "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}",
                    f'-DUAPI_NAMES="{names}"', str(ROOT / "tests/c/uapi_layouts.c"), "-o", str(program)], check=True)
    view = {kind: [] for kind in ("struct", "field", "flexible", "older", "constant", "string")}
    for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
        kind, *words = line.split()
        view[kind].append(words)
    return view


def test_c_structs_have_the_kernel_layout(c_view):
    assert {name: int(size) for name, size in c_view["struct"]} == {n: s["size"] for n, s in DATA["structs"].items()}
    wanted, flexible = {}, {}
    for name, entry in DATA["structs"].items():
        for field in entry["fields"]:
            kind = {"le64": "u64", "ptr": "u64[]"}.get(field["type"], field["type"])
            kind = (kind if kind in SCALARS or kind == "u64[]" else "struct") + ("[]" if "array" in field else "")
            if field.get("flexible"):
                flexible[name, field["name"]] = (field["offset"], field["element_size"])
            else:
                wanted[name, field["name"]] = (field["offset"], field["size"], kind)
    assert {(s, f): (int(at), int(size), kind) for s, f, at, size, kind in c_view["field"]} == wanted
    assert {(s, f): (int(at), int(size)) for s, f, at, size in c_view["flexible"]} == flexible


def test_c_knows_the_older_sizes(c_view):
    wanted = {(name, kernel, form.size) for name, newest in of_kind(Layout).items()
              for kernel, form in newest.older.items() if form.size != newest.size}
    assert {(s, kernel.replace("_", "."), int(size)) for s, kernel, size in c_view["older"]} == wanted


def test_c_constants_have_the_kernel_values(c_view):
    wanted = {n: c["value"] for kind in ("constants", "ioctls") for n, c in DATA[kind].items()}
    assert {name: int(value) for name, value in c_view["constant"]} == wanted
    assert dict(c_view["string"]) == DATA["strings"]


def test_c_declares_nothing_else():
    text = "\n".join(re.sub(r"/\*.*?\*/", "", h.read_text(), flags=re.S) for h in HEADERS if h.name != "layout.h")
    assert set(re.findall(r"\bUAPI_(\w+) = ", text)) == set(DATA["constants"]) | set(DATA["ioctls"])
    assert set(re.findall(r"^struct uapi_(\w+) \{", text, re.M)) == set(DATA["structs"])
    enums = dict(re.findall(r"^enum uapi_(\w+) \{(.*?)\}", text, re.M | re.S))
    assert {name: re.findall(r"UAPI_(\w+) =", body) for name, body in enums.items()} == {
        name: list(members) for name, members in DATA["enums"].items()}


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_c_header_compiles_alone(header, tmp_path):
    if COMPILER is None:
        pytest.skip("no C compiler")
    source = tmp_path / "alone.c"
    source.write_text(f'#include "uapi/{header.name}"\n')
    subprocess.run([COMPILER, "-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
                    f"-I{ROOT / 'csrc'}", str(source)], check=True)

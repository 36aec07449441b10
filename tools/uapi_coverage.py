"""Write docs/uapi-coverage.md: what of the two founding headers is declared, modelled, used with a kernel, and tested.

    python tools/uapi_coverage.py            # writes the page
    python tools/uapi_coverage.py --check    # exit status 1 when the page is not up to date

A cell names the files whose code uses the symbol; comments, docstrings and the declarations themselves do not count.
"Use" is the name in Python's syntax tree or in Cython's text, through the aliases of .pxd files, or a member of an
enumeration whose value is the symbol (``MigrationState.STOP_COPY``).  Where code does its work without the name (a
struct packed by hand, a number in a test), a line of BY_HAND says so and names a file with a text that must be in it.
"""
import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/uapi-coverage.md"
COLUMNS = ("declared", "software", "kernel", "tests")
NOT_YET = "**not yet**"

# Software: what is compiled and device models, too; kernel: the rest of vfiodma/devices, and the compiled calls.
MODELS = re.compile(r"vfiodma/(backends/software/|_core/(?!kernel|iommufd\.)"
                    r"|devices/(model_|edu(_config|_dma|_migration)?\.|dma_writer))")
KERNEL = re.compile(r"vfiodma/(backends/(?!software)|_core/(kernel|iommufd)\.|devices/|kernel\.py|hostinfo\.py"
                    r"|nesting\.py|cli/probe|liveupdate/|migration/)")
# These test the declarations.
NO_TESTS = ("test_uapi.py", "test_uapi_coverage.py")

# (symbol pattern, column, file, text that is in it, words)
BY_HAND: list[tuple[str, str, str, str, str]] = [
    # software
    ("vfio_irq_set", "software", "vfiodma/backends/software/device/irqs.py", '_HEAD = struct.Struct("=IIIII")',
     "by hand"),
    ("vfio_device_ioeventfd", "software", "vfiodma/backends/software/device/ioeventfd.py", 'struct.Struct("=IIQQi")',
     "by hand"),
    ("VFIO_DEVICE_IOEVENTFD_SIZE_MASK", "software", "vfiodma/backends/software/device/ioeventfd.py",
     "flags not in _WIDTHS", "one of the widths"),
    ("vfio_pci_hot_reset(_info)?", "software", "vfiodma/backends/software/device/reset.py",
     '_HEAD = struct.Struct("=III")', "by hand"),
    ("vfio_pci_dependent_device", "software", "vfiodma/backends/software/device/reset.py", 'struct.pack("=IHBB"',
     "by hand"),
    ("vfio_device_feature", "software", "vfiodma/backends/software/device/features.py", '_HEAD = struct.Struct("=II")',
     "by hand"),
    ("vfio_device_feature_migration", "software", "vfiodma/backends/software/device/migration.py",
     'struct.pack("=Q", flags)', "by hand"),
    ("vfio_device_low_power_entry_with_wakeup", "software", "vfiodma/backends/software/device/features.py",
     'struct.unpack("=iI"', "by hand"),
    ("vfio_device_feature_dma_logging_range", "software", "vfiodma/backends/software/device/dma_logging.py",
     'struct.unpack("=QQ"', "by hand"),
    ("vfio_region_info_cap_(type|sparse_mmap|nvlink2_ssatgt|nvlink2_lnkspd)|vfio_region_sparse_mmap_area", "software",
     "vfiodma/devices/model_regions.py", 'struct.pack("=II"', "by hand"),
    ("vfio_iova_range", "software", "vfiodma/_core/ioctl.pyx", "iova_range", "by hand"),
    ("vfio_iommu_spapr_tce_ddw_info", "software", "vfiodma/backends/software/spapr.py", "ddw", "part of tce_info"),
    ("VFIO_DEVICE_INFO_CAP_ZPCI_.*", "software", "vfiodma/backends/software/device/info.py", '"info_caps"',
     "what a device's info_caps has"),
    ("VFIO_PCI_BAR[0-4]_REGION_INDEX", "software", "vfiodma/backends/software/device/ioeventfd.py", "bar > _LAST_BAR",
     "by number"),
    ("IOMMU_FAULT_REASON_.*", "software", "csrc/pagewalk.h", "PAGEWALK_UNKNOWN, PAGEWALK_PASID_FETCH", "by number"),
    ("IOMMU_FAULT_PERM_.*", "software", "csrc/pagewalk.h", "PAGEWALK_READ = 1, PAGEWALK_WRITE = 2", "by number"),
    ("IOMMU_CACHE_INV_TYPE_(DEV_)?IOTLB", "software", "vfiodma/_core/nesting.pyx", "DEV_IOTLB = 2", "by number"),
    ("IOMMU_CACHE_INV_TYPE_PASID", "software", "vfiodma/_core/nesting.pyx", "PASID_CACHE = 4", "by number"),
    ("IOMMU_INV_GRANU_(DOMAIN|PASID|ADDR)", "software", "vfiodma/_core/nesting.pyx", "BY_DOMAIN = 0", "by number"),
    ("VFIO_IOMMU_NESTING_OP_.*", "software", "vfiodma/_core/nesting.pyx", "UNBIND = 1", "by number"),
    ("IOMMU_PASID_FORMAT_INTEL_VTD", "software", "vfiodma/_core/nesting.pyx", "VTD = 1", "by number"),
    ("iommu_inv_(addr|pasid)_info|iommu_gpasid_bind_data_vtd|iommu_nesting_info_vtd", "software",
     "vfiodma/_core/uapi.pxd", "inv_addr_info addr_info", "part of another"),
    ("IOMMU_SVA_VTD_GPASID_(CD|EMTE|PCD|PWT|MTS_MASK)", "software", "vfiodma/_core/nesting.pyx", "BIND_MEMORY_TYPES",
     "refused"),
    ("IOMMU_SVA_VTD_GPASID_(SRE|EAFE)", "software", "vfiodma/_core/nesting.pyx", "BIND_SRE_EAFE", "by number"),
    ("IOMMU_(GPASID_BIND|CACHE_INVALIDATE_INFO)_VERSION_1", "software", "vfiodma/_core/nesting.pyx", ".version != 1",
     "by number"),
    ("IOMMU_INV_(ADDR|PASID)_FLAGS_.*", "software", "vfiodma/_core/nesting.pyx", "_info.flags & ~", "by number"),
    ("IOMMU_SVA_GPASID_VAL|VFIO_NESTING_OP_MASK", "software", "vfiodma/_core/nesting.pyx", ".flags & ~<uint",
     "by number"),
    ("IOMMU_NESTING_FEAT_.*", "software", "vfiodma/_core/nesting.pyx", "info.features = 3", "by number"),
    ("VFIO_DEVICE_FLAGS_.*", "software", "vfiodma/backends/software/device/state.py", 'getattr(device, "bus"',
     "what a device's bus has"),
    ("VFIO_CCW_.*_IRQ_INDEX", "software", "vfiodma/backends/software/device/simple_irqs.py", ">= state.irq_indexes",
     "by number"),
    # kernel
    ("vfio_device_feature_dma_logging_range", "kernel", "vfiodma/devices/dma_log.py", "_MAX_RANGES = 256", "by hand"),
    ("vfio_device_low_power_entry_with_wakeup", "kernel", "vfiodma/devices/features.py",
     'pack_fds("enter_low_power", [wakeup]) + bytes(4)', "by hand"),
    ("vfio_info_cap_header", "kernel", "vfiodma/uapi/caps.py", "def capability_chain", "by hand"),
    ("vfio_iommu_spapr_tce_ddw_info|vfio_eeh_pe_err", "kernel", "vfiodma/backends/spapr.py", "abi.vfio_",
     "part of another"),
    ("VFIO_DEVICE_INFO_CAP_ZPCI_.*", "kernel", "vfiodma/devices/pci.py", "capabilities: tuple[Capability, ...]",
     "DeviceInfo.capabilities"),
    ("VFIO_PCI_BAR[0-5]_REGION_INDEX", "kernel", "vfiodma/devices/regions.py", 'f"BAR {index}"', "by number"),
    ("VFIO_CCW_CONFIG_REGION_INDEX", "kernel", "vfiodma/devices/regions.py", "def __getitem__", "by number"),
    ("VFIO_REGION_(TYPE_CCW|SUBTYPE_(CCW|INTEL|NVIDIA|IBM)_.*)", "kernel", "vfiodma/devices/regions.py", "def find",
     "Regions.find"),
    ("VFIO_DMA_MAP_FLAG_(READ|WRITE)", "kernel", "vfiodma/types.py", "class Prot", "Prot"),
    # tests
    ("vfio_iommu_spapr_tce_ddw_info", "tests", "tests/unit/test_spapr.py", 'told["ddw"]', "part of tce_info"),
    ("VFIO_DMA_MAP_FLAG_.*", "tests", "tests/oracle/type1.py", "READ, WRITE, VADDR = 1, 2, 4", "by number"),
    ("VFIO_DMA_UNMAP_FLAG_.*", "tests", "tests/oracle/type1.py", "GET_DIRTY, ALL, UNMAP_VADDR = 1, 2, 4", "by number"),
    ("VFIO_IOMMU_DIRTY_PAGES_FLAG_.*|vfio_iommu_type1_dirty_bitmap(_get)?", "tests", "tests/oracle/type1.py",
     "START, STOP, GET_BITMAP = 1, 2, 4", "by number"),
    ("vfio_iommu_type1_dma_map", "tests", "tests/oracle/type1.py", 'struct.unpack("IIQQQ"', "by hand"),
    ("vfio_iommu_type1_dma_unmap|vfio_bitmap", "tests", "tests/oracle/type1.py", 'struct.unpack("QQQ"', "by hand"),
    ("vfio_iommu_type1_info|VFIO_IOMMU_INFO_.*", "tests", "tests/oracle/type1.py", 'struct.pack("IIQII", argsz_out',
     "by hand"),
    ("vfio_info_cap_header", "tests", "tests/oracle/type1.py", 'struct.pack("HHI", number, 1, following)', "by hand"),
    ("vfio_iommu_type1_info_(cap_iova_range|cap_migration|dma_avail)|vfio_iova_range", "tests", "tests/oracle/type1.py",
     'struct.pack("IIQQ", 0, 0, self.min_pg, MAX_BITMAP_BYTES)', "by hand"),
    ("VFIO_(DMA_CC|TYPE1_NESTING|NOIOMMU)_IOMMU|VFIO_U(NMAP_ALL|PDATE_VADDR)|VFIO_IOMMU_SPAPR_INFO_DDW", "tests",
     "tests/oracle/container.py", "def check_extension", "by number"),
    ("vfio_group_status|VFIO_GROUP_FLAGS_.*", "tests", "tests/oracle/container.py",
     'struct.pack("II", argsz, 3 if group.container else 1)', "by number"),
    ("vfio_device_feature", "tests", "tests/unit/test_software_device_features.py",
     'struct.pack("=II", argsz, flags) + data', "by hand"),
    ("VFIO_DEVICE_FEATURE_MASK", "tests", "tests/unit/test_software_device_features.py", "1 << 19 | PROBE",
     "bits beyond it"),
    ("vfio_device_low_power_entry_with_wakeup", "tests", "tests/unit/test_software_device_features.py",
     'struct.pack("=iI", wakeup, 0)', "by hand"),
    ("vfio_device_feature_(mig_state|migration)", "tests", "tests/device_answers.py", "FEATURE", "by hand"),
    ("vfio_device_ioeventfd|VFIO_DEVICE_IOEVENTFD_.*", "tests", "tests/unit/test_software_device_features.py",
     'struct.pack("=IIQQiI", 32, width', "by number"),
    ("VFIO_PCI_NUM_(IRQS|REGIONS)", "tests", "tests/unit/test_software_device_regions.py", "cap_offset) == (56, 3 |",
     "by number"),
    ("VFIO_PCI_.*_REGION_INDEX", "tests", "tests/device_answers.py", "REGION", "every index by number"),
    ("vfio_pci_(hot_reset|hot_reset_info|dependent_device)", "tests", "tests/unit/test_software_device_reset.py",
     'struct.unpack_from("=IHBB"', "by hand"),
    ("vfio_region_gfx_edid|VFIO_DEVICE_GFX_LINK_STATE_.*", "tests", "tests/unit/test_model_regions.py",
     "def test_writes_of_the_edid_region_that_are_refused", "by number"),
    ("vfio_region_info_cap_.*|vfio_region_sparse_mmap_area|VFIO_REGION_INFO_CAP_.*", "tests",
     "tests/unit/test_device_parts.py", "def test_every_capability_of_a_region_is_decoded", "by number"),
    ("VFIO_REGION_TYPE_PCI_VENDOR_MASK", "tests", "tests/unit/test_model_regions.py", "info.type.vendor == 0x8086",
     "RegionType.vendor"),
    ("VFIO_DEVICE_INFO_CAP_ZPCI_.*", "tests", "tests/unit/test_software_device_regions.py", "(4, 2, b\"abc\")",
     "as any capability"),
    ("VFIO_IOMMU_NESTING_OP_.*|vfio_iommu_type1_nesting_op", "tests", "tests/unit/test_nesting_op.py",
     "abi.VFIO_IOMMU_NESTING_OP, struct.pack(", "by number"),
    ("IOMMU_(PASID_FORMAT_INTEL_VTD|GPASID_BIND_VERSION_1)", "tests", "tests/unit/test_nesting_op.py",
     '"version": 1, "format": 1', "by number"),
    ("iommu_(cache_invalidate_info|inv_.*_info)|IOMMU_(CACHE_INV_TYPE|INV_GRANU|CACHE_INVALIDATE_INFO)_.*",
     "tests", "tests/unit/test_nesting_op.py", "=IIBB", "by hand"),
    ("IOMMU_SVA_VTD_GPASID_(CD|EMTE|PCD|PWT|MTS_MASK)", "tests", "tests/unit/test_nesting_op.py",
     "for bit in (4, 8, 16, 32)",
     "by number"),
    ("IOMMU_NESTING_FEAT_.*", "tests", "tests/unit/test_nesting_op.py", 'info["features"]) == (64, 0, 1, 3)',
     "by number"),
    ("VFIO_IOMMU_TYPE1_INFO_CAP_NESTING|vfio_iommu_type1_info_cap_nesting", "tests", "tests/unit/test_nesting_op.py",
     "list(found) == [2, 3, 1, 4]", "by number"),
    ("VFIO_API_VERSION", "tests", "tests/oracle/container.py", "GET_API_VERSION", "by number"),
]

# (symbol pattern, columns, words): nothing is missing though the cells are empty.
NOTHING_TO_DO: list[tuple[str, tuple[str, ...], str]] = [
    ("VFIO_(TYPE|BASE)", ("software", "kernel", "tests"), "part of every request's number"),
    ("VFIO_.*MIGRATION_DEPRECATED|vfio_device_migration_info|VFIO_DEVICE_STATE_(V1_.*|MASK)",
     ("software", "kernel", "tests"), "deprecated by the header: no driver has it"),
    ("VFIO_IRQ_SET_(ACTION|DATA)_TYPE_MASK", ("kernel",), "for the side that checks"),
    ("VFIO_DEVICE_IOEVENTFD_SIZE_MASK", ("kernel",), "for the side that checks"),
    ("VFIO_(PCI|CCW)_NUM_(IRQS|REGIONS)", ("kernel",), "told by GET_INFO"),
    ("VFIO_NESTING_OP_MASK", ("kernel",), "for the side that checks"),
    ("VFIO_GROUP_FLAGS_CONTAINER_SET|VFIO_GROUP_UNSET_CONTAINER|VFIO_API_VERSION|VFIO_GET_API_VERSION", ("kernel",),
     "not needed: closing does it, or the next call tells"),
    ("VFIO_(TYPE1_NESTING_IOMMU|EEH|DMA_CC_IOMMU)|VFIO_IOMMU_DISABLE", ("kernel",),
     "not needed: the typed side chooses by what it does; closing disables"),
    ("IOMMU_(CACHE_INV_TYPE_NR|INV_GRANU_NR|PASID_FORMAT_LAST|SVA_VTD_GPASID_LAST)", ("software", "kernel", "tests"),
     "a limit, not a value of a call"),
    ("vfio_iommu_type1_(info_cap_nesting|nesting_op)|IOMMU_(CACHE_INV|FAULT|INV|NESTING|SVA)_.*", ("kernel",),
     "no kernel that was released takes it"),
    ("VFIO_DEVICE_API_.*_STRING", ("software", "kernel", "tests"), "a text of sysfs, not of a call"),
]


def names_of(nodes: list[ast.AST]) -> set[str]:
    """Every name, attribute, imported name and "Class.MEMBER" among the nodes of a file; texts are no use."""
    names, local = set(), {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):       # S = MigrationState
            local |= {target.id: node.value.id for target in node.targets if isinstance(target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
            if isinstance(node.value, ast.Name):
                names.add(f"{local.get(node.value.id, node.value.id)}.{node.attr}")
        elif isinstance(node, ast.alias):
            names.add(node.name)
    return names


def members_of(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Members of classes whose value is a symbol: ("MigrationState.STOP_COPY", "VFIO_DEVICE_STATE_STOP_COPY")."""
    for node in nodes:
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Attribute):
                yield from ((f"{node.name}.{target.id}", item.value.attr)
                            for target in item.targets if isinstance(target, ast.Name))


def cython_words(text: str) -> set[str]:
    """Words of a .pyx or .pxd file outside of comments and strings."""
    return set(re.findall(r"\w+", re.sub(r'""".*?"""|"[^"\n]*"|#[^\n]*', " ", text, flags=re.DOTALL)))


class Uses:
    """Which files use which symbols."""

    def __init__(self) -> None:
        words: dict[str, set[str]] = {}
        means = defaultdict(set)            # alias -> symbols
        for path in sorted([*ROOT.glob("vfiodma/**/*.p*"), *ROOT.glob("tests/**/*.py")]):
            name, text = str(path.relative_to(ROOT)), ""
            if path.suffix in (".py", ".pyx", ".pxd"):
                text = path.read_text()
            if path.suffix == ".py":
                nodes = list(ast.walk(ast.parse(text)))
                words[name] = names_of(nodes)
                for member, symbol in members_of(nodes):
                    means[member].add(symbol)
            elif path.suffix in (".pyx", ".pxd"):
                for alias, symbol in re.findall(r'(\w+) "(?:struct )?(?:UAPI_|uapi_)(\w+)"', text):
                    means[alias].add(symbol)
                if path.suffix == ".pyx":
                    words[name] = cython_words(re.sub(r'\w+ "(?:struct )?(?:UAPI_|uapi_)\w+"', " ", text))
        self.files: dict[str, list[str]] = defaultdict(list)
        for name, used in words.items():
            symbols = set(used)
            for word in used:
                if word in means and (name.endswith(".pyx") or "." in word):
                    symbols |= means[word]
            for symbol in symbols:
                self.files[symbol].append(name)

    def of(self, symbol: str, column: str) -> list[str]:
        """Files that use a symbol, of the kind that a column is for."""
        return [name for name in self.files.get(symbol, ()) if column == kind(name)]


def kind(name: str) -> str | None:
    """Return the column that a file counts in."""
    if name.startswith("tests/"):
        return None if name.endswith(NO_TESTS) else "tests"
    if name.startswith("vfiodma/uapi/"):
        return "declared" if Path(name).stem in ("vfio", "iommu") else None
    if MODELS.match(name):
        return "software"
    return "kernel" if KERNEL.match(name) else None


def shown(names: Iterable[str]) -> str:
    """Return files as a cell: the first one; more would change the page with every new file."""
    return re.sub(r"^(vfiodma|tests)/", "", min(names))


def cell(uses: Uses, symbol: str, column: str, used: set[int]) -> str:
    """Return the text of a cell; ``used`` collects the lines of the tables that were needed."""
    if files := uses.of(symbol, column):
        return shown(files)
    for number, (pattern, where, name, _, words) in enumerate(BY_HAND):
        if where == column and re.fullmatch(pattern, symbol):
            used.add(number)
            return f"{shown([name])}: {words}"
    for number, (pattern, columns, words) in enumerate(NOTHING_TO_DO, len(BY_HAND)):
        if column in columns and re.fullmatch(pattern, symbol):
            used.add(number)
            return f"({words})"
    return NOT_YET


def symbols(data: dict, what: str) -> list[str]:
    """Return the founding headers' names of a kind, in order."""
    if what == "strings":
        return sorted(data[what])
    return sorted(name for name, entry in data[what].items()
                  if any(source.startswith("founding") for source in entry["in_sources"]))


def stale() -> list[str]:
    """Return lines of BY_HAND whose text is not where they say."""
    return [f"not in {name}: {text}" for _, _, name, text, _ in BY_HAND if text not in (ROOT / name).read_text()]


def unused(used: set[int]) -> list[str]:
    """Return lines of the tables that no cell needs any more."""
    return [f"not needed: {line[0]}: {line[1]}" for number, line in enumerate([*BY_HAND, *NOTHING_TO_DO])
            if number not in used]


def render() -> tuple[str, list[str]]:
    """Return the page, and the lines of the tables that no cell needs."""
    data = json.loads((ROOT / "tests/data/uapi-layouts.json").read_text())
    uses, used, missing, body = Uses(), set(), dict.fromkeys(COLUMNS, 0), []
    total = 0
    for what, title in (("ioctls", "ioctls"), ("structs", "Structs"), ("constants", "Flags and constants"),
                        ("strings", "Strings")):
        body += ["", f"## {title}", "", "| name | declared | software | kernel backend | tested by |",
                 "|---|---|---|---|---|"]
        for symbol in symbols(data, what):
            cells = [cell(uses, symbol, column, used) for column in COLUMNS]
            total += 1
            for column, text in zip(COLUMNS, cells, strict=True):
                missing[column] += text == NOT_YET
            body.append(f"| `{symbol}` | {' | '.join(cells)} |")
    head = f"""# Coverage of the two founding headers

Every ioctl, struct, flag and constant of the founding `vfio.h` and of the vSVA series' `iommu.h` with its additions
to `vfio.h`.  Written by `tools/uapi_coverage.py`, which says how a cell is decided; a test checks that it is
up to date.

* **declared**: in `vfiodma/uapi`; values, sizes and offsets are tested against compiled headers.
* **software**: files of the software VFIO and its devices that use it. **kernel backend**: files of the typed side,
  which runs on the running kernel's VFIO (and on the software one).
* **tested by**: test files that use it, tests of the declarations aside. `file: words` is work done without the name.
* **(words)**: nothing to do there, and why. {NOT_YET}: not there.

Of {total} names, not there yet: """ + ", ".join(
        f"{missing[column]} {label}" for column, label in zip(
            COLUMNS, ("declared", "in software", "with a kernel", "tested"), strict=True)) + "."
    return head + "\n" + "\n".join(body) + "\n", unused(used)


def main() -> int:
    """Write or check the page."""
    page, extra = render()
    wrong = stale()
    for line in extra + wrong:
        print(line, file=sys.stderr)
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page:
            print("docs/uapi-coverage.md is not up to date: run tools/uapi_coverage.py", file=sys.stderr)
            return 1
    else:
        PAGE.write_text(page)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

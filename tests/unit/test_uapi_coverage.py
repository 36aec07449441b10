"""docs/uapi-coverage.md is what tools/uapi_coverage.py finds, and the tool finds what it says."""
import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("uapi_coverage", ROOT / "tools/uapi_coverage.py")
assert SPEC is not None and SPEC.loader is not None
coverage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(coverage)


def nodes_of(text):
    return list(ast.walk(ast.parse(text)))


@pytest.fixture(scope="module")
def rendered():
    return coverage.render()


def test_the_page_is_up_to_date(rendered):
    page, _ = rendered
    old = coverage.PAGE.read_text()
    different = sorted(set(page.splitlines()) ^ set(old.splitlines()))
    assert page == old, "run tools/uapi_coverage.py; " + "\n".join(different[:10])


def test_every_name_of_the_headers_has_a_row_without_an_empty_cell():
    """The numbers are those of the headers themselves, counted apart from the tool."""
    rows, title = {}, ""
    for line in coverage.PAGE.read_text().splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 4 and all(cells) and coverage.NOT_YET not in cells, line
            rows.setdefault(title, set()).add(name.strip("`"))
    assert {title: len(names) for title, names in rows.items()} == {
        "ioctls": 31, "Structs": 55, "Flags and constants": 211, "Strings": 5}
    assert set.union(*rows.values()) >= {"VFIO_SET_IOMMU", "VFIO_IOMMU_NESTING_OP", "iommu_fault", "vfio_eeh_pe_op"}


def test_a_name_that_nothing_uses_is_not_yet_there():
    uses = coverage.Uses.__new__(coverage.Uses)
    uses.files = {"VFIO_NEW": ["vfiodma/uapi/vfio.py"]}
    assert [coverage.cell(uses, "VFIO_NEW", column, set()) for column in coverage.COLUMNS] == [
        "uapi/vfio.py", *[coverage.NOT_YET] * 3]


def test_a_page_that_lacks_a_name_or_claims_more_is_refused(tmp_path, monkeypatch, rendered, capsys):
    page, _ = rendered
    monkeypatch.setattr(coverage, "render", lambda: rendered)
    monkeypatch.setattr(coverage, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr("sys.argv", ["uapi_coverage.py", "--check"])
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for old, new, status in (("", "", 0), (rows[7] + "\n", "", 1), (rows[-1], rows[-1].replace("uapi/", "other/"), 1)):
        coverage.PAGE.write_text(page.replace(old, new) if old else page)
        assert coverage.main() == status
    assert "not up to date" in capsys.readouterr().err


def test_what_is_done_by_hand_is_where_the_tables_say():
    assert coverage.stale() == []


def test_examples_comments_and_strings_are_no_use():
    nodes = nodes_of('"""VFIO_A"""\n# VFIO_B\nx = "VFIO_C"\ny = abi.VFIO_D')
    assert {name for name in coverage.names_of(nodes) if name.startswith("VFIO")} == {"VFIO_D"}
    assert coverage.cython_words('"""A"""\nB = 1  # C\nD("E")') == {"B", "D", "1"}


def test_a_member_of_an_enumeration_is_its_symbol():
    declared = nodes_of("class Kind(IntEnum):\n    ONE = abi.VFIO_ONE\n    TWO = 2\n")
    assert list(coverage.members_of(declared)) == [("Kind.ONE", "VFIO_ONE")]
    assert "Kind.ONE" in coverage.names_of(nodes_of("K = Kind\nprint(K.ONE)"))


def test_files_count_once():
    assert [coverage.kind(f"vfiodma/{name}") for name in (
        "uapi/vfio.py", "uapi/iommufd.py", "backends/software/files.py", "_core/ioctl.pyx", "_core/kernel.pyx",
        "devices/edu.py", "devices/edu_driver.py", "devices/regions.py", "backends/type1.py")] == [
        "declared", None, "software", "software", "kernel", "software", "kernel", "kernel", "kernel"]
    assert coverage.kind("tests/unit/test_uapi.py") is None and coverage.kind("tests/unit/test_spapr.py") == "tests"

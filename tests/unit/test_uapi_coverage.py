"""docs/uapi-coverage.md is what tools/uapi_coverage.py finds, and the tool finds what it says."""
import ast
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("uapi_coverage", ROOT / "tools/uapi_coverage.py")
assert SPEC is not None and SPEC.loader is not None
coverage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(coverage)


def test_the_page_is_up_to_date():
    page, _ = coverage.render()
    old = coverage.PAGE.read_text()
    different = sorted(set(page.splitlines()) ^ set(old.splitlines()))
    assert page == old, "run tools/uapi_coverage.py; " + "\n".join(different[:10])


def test_what_is_done_by_hand_is_where_the_tables_say():
    assert coverage.stale() == []


def test_examples_comments_and_strings_are_no_use():
    tree = coverage.without_docstrings(ast.parse('"""VFIO_A"""\n# VFIO_B\nx = "VFIO_C"\ny = abi.VFIO_D'))
    assert {name for name in coverage.names_of(tree) if name.startswith("VFIO")} == {"VFIO_D"}
    assert coverage.cython_words('"""A"""\nB = 1  # C\nD("E")') == {"B", "D", "1"}


def test_a_member_of_an_enumeration_is_its_symbol():
    declared = ast.parse("class Kind(IntEnum):\n    ONE = abi.VFIO_ONE\n    TWO = 2\n")
    assert list(coverage.members_of(declared)) == [("Kind.ONE", "VFIO_ONE")]
    assert "Kind.ONE" in coverage.names_of(ast.parse("K = Kind\nprint(K.ONE)"))


def test_files_count_once():
    assert [coverage.kind(f"vfiodma/{name}") for name in (
        "uapi/vfio.py", "uapi/iommufd.py", "backends/software/files.py", "_core/ioctl.pyx", "_core/kernel.pyx",
        "devices/edu.py", "devices/edu_driver.py", "devices/regions.py", "backends/type1.py")] == [
        "declared", None, "software", "software", "kernel", "software", "kernel", "kernel", "kernel"]
    assert coverage.kind("tests/unit/test_uapi.py") is None and coverage.kind("tests/unit/test_spapr.py") == "tests"

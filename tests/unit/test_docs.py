"""What the documents show is run."""
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import vfiodma

ROOT = Path(__file__).parents[2]
MODULES = sorted(module.name for module in pkgutil.walk_packages(vfiodma.__path__, "vfiodma.")
                 if not module.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/devices.md", "docs/snapshots.md",
                                      "docs/device-state.md", "docs/spapr.md", "docs/iommufd.md", "docs/nesting.md"])
def test_python_examples_of_documents_run(document):
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, document, "exec"), {"__name__": "example"})


def test_links_between_documents_lead_somewhere():
    broken = []
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "tests/README.md"]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text()):
            if not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_diagrams_have_nothing_that_mermaid_takes_for_the_end_of_a_statement(document):
    for diagram in re.findall(r"^```mermaid\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        kind = diagram.split()[0]
        assert kind in ("flowchart", "sequenceDiagram", "stateDiagram-v2")
        for line in re.sub('"[^"\n]*"', '""', diagram).splitlines():
            assert kind == "flowchart" or not set(";#") & set(line), line
            assert kind != "stateDiagram-v2" or line.count(":") <= 1, line

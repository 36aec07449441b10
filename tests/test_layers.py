"""Who may import whom, for Python files and extensions alike, and what `import vfiodma` costs."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vfiodma

PACKAGE = Path(vfiodma.__file__).parent

# Each room and the rooms that it may import, besides itself.
LEAVES = {"errors", "types"}
PLAIN = LEAVES | {"protocols", "uapi"}
MIDDLE = PLAIN | {"_core", "address_space", "memory", "devices", "hostinfo", "kernel", "sources"}
ALLOWED = {
    "errors": set(), "types": set(), "uapi": set(),
    "protocols": LEAVES,
    "hostinfo": LEAVES | {"uapi"},
    "_core": LEAVES | {"uapi"},
    "kernel": PLAIN | {"_core", "hostinfo"},
    "sources": PLAIN | {"_core"},
    "backends": PLAIN | {"_core", "hostinfo", "kernel", "sources"},
    "address_space": MIDDLE | {"backends"},         # of backends only open_backend: see below
    "memory": MIDDLE, "devices": MIDDLE, "nesting": PLAIN | {"_core"},
    "migration": MIDDLE | {"liveupdate"}, "liveupdate": MIDDLE | {"backends"},
    "serve": MIDDLE | {"backends"},
    "cli": MIDDLE | {"backends", "migration", "liveupdate", "serve", "testing"},
    "testing": MIDDLE | {"backends", "migration", "liveupdate", "serve"},
    "__main__": {"cli"},
}
TOP = {"cli", "testing"}        # may use the public names of `vfiodma` itself
OPENERS = {"vfiodma.backends.open_backend", "vfiodma.backends.adopt_backend"}

CYTHON_IMPORT = re.compile(
    r"^\s*(?:from\s+(?P<source>[.\w]+)\s+c?import\s+\(?(?P<names>[^#\n]*)|c?import\s+(?P<modules>[^#\n]+))",
    re.MULTILINE)


def module_of(path):
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return (parts[:-1], True) if parts[-1] == "__init__" else (parts, False)


def absolute(source, importer, is_package):
    """Resolve a relative module name as the import statement does."""
    dots = len(source) - len(source.lstrip("."))
    if not dots:
        return source
    base = importer[:len(importer) - dots + is_package]
    return ".".join([*base, *filter(None, [source.lstrip(".")])])


def type_checking_blocks(tree):
    blocks = [node for node in ast.walk(tree)
              if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def statements(path):
    """Yield (module as written, imported names) of every import and cimport of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        tree = ast.parse(text)
        unused_at_run_time = type_checking_blocks(tree)
        for node in ast.walk(tree):
            if id(node) in unused_at_run_time:
                continue
            if isinstance(node, ast.ImportFrom):
                yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                yield from ((alias.name, []) for alias in node.names)
        return
    for match in CYTHON_IMPORT.finditer(text):
        if match["source"]:
            yield match["source"], re.findall(r"\w+", match["names"])
        else:
            yield from ((name.split()[0], []) for name in match["modules"].split(",") if name.strip())


def imports(path):
    """Yield the dotted names inside the package that a file imports."""
    importer, is_package = module_of(path)
    for source, names in statements(path):
        target = absolute(source, importer, is_package)
        if target.split(".")[0] != PACKAGE.name:
            continue
        if names and (PACKAGE.parent / target.replace(".", "/") / "__init__.py").exists():
            yield from (f"{target}.{name}" for name in names)
        else:
            yield target


def files():
    return sorted(path for suffix in ("py", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{suffix}"))


def test_every_room_is_named_in_the_rule():
    rooms = {module_of(path)[0][1] for path in files() if len(module_of(path)[0]) > 1}
    assert rooms <= set(ALLOWED)


def test_files_import_only_from_the_rooms_below_them():
    wrong = []
    for path in files():
        importer = module_of(path)[0]
        if len(importer) == 1:
            continue
        room = importer[1]
        for target in imports(path):
            to = target.split(".")[1]
            if to not in ALLOWED[room] | {room} and not (room in TOP and to not in ALLOWED):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_only_the_backends_room_knows_a_concrete_backend():
    wrong = [f"{path.relative_to(PACKAGE)} imports {target}" for path in files() for target in imports(path)
             if target.startswith("vfiodma.backends.") and target not in OPENERS
             and module_of(path)[0][1:2] not in (["backends"], ["serve"], ["testing"])]
    assert not wrong, "\n".join(wrong)


def test_backends_do_not_know_one_another():
    wrong = []
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = module_of(path)[0][2:3]
        wrong += [f"{path.relative_to(PACKAGE)} imports {target}" for target in imports(path)
                  if own and target.startswith("vfiodma.backends.") and target.split(".")[2] != own[0]]
    assert not wrong, "\n".join(wrong)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent)


def test_import_opens_no_descriptor_and_starts_no_thread():
    result = run("""
import os, threading
before = set(os.listdir("/proc/self/fd"))
import vfiodma
assert set(os.listdir("/proc/self/fd")) == before
assert threading.active_count() == 1
""")
    assert result.returncode == 0, result.stderr


def test_import_brings_in_no_library():
    result = run("""
import sys
import vfiodma
heavy = {"numpy", "psutil", "typer", "rich", "matplotlib", "ctypes", "asyncio", "multiprocessing"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
""")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", sorted(vfiodma.__all__))
def test_public_name_is_imported_without_numpy(name):
    result = run(f"import sys, vfiodma; vfiodma.{name}; assert 'numpy' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_public_names_are_listed():
    assert set(vfiodma.__all__) <= set(dir(vfiodma))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vfiodma.no_such_name


def test_module_files_open_no_library_of_an_extra_at_import():
    """typer, rich and matplotlib belong to extras: only the command line may need them, inside its functions."""
    wrong = []
    for path in files():
        if path.suffix != ".py" or module_of(path)[0][1:2] == ["cli"]:
            continue
        for node in ast.parse(path.read_text()).body:
            names = {ast.Import: lambda n: [a.name for a in n.names], ast.ImportFrom: lambda n: [n.module or ""]}.get(
                type(node), lambda n: [])(node)
            wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in names
                      if name.split(".")[0] in {"typer", "rich", "matplotlib"}]
    assert not wrong, "\n".join(wrong)

"""For tests of backends and of what stands on them: a conformance suite, hypothesis strategies, injected failures.

Needs the extra "testing" (pytest, hypothesis), where those are used.
"""
import importlib
import sys
from typing import Any

from ..errors import MissingExtraError

_HOME = {
    "BackendConformance": "conformance",
    "EveryFailure": "faults", "FailingBackend": "faults", "InjectedError": "faults",
    "mappings": "strategies", "page_ranges": "strategies", "prots": "strategies",
}
__all__ = list(_HOME)

if sys.modules.get("pytest"):
    # Before they are imported: their assertions then show values, as those of test files do.
    sys.modules["pytest"].register_assert_rewrite(f"{__name__}.checks", f"{__name__}.rig")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as exc:
        if exc.name not in ("pytest", "hypothesis"):
            raise
        raise MissingExtraError(exc.name, "testing") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

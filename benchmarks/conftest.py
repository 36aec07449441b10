"""After the run: each ratio beside its limit and its peer, as the benchmarks noted them in `extra_info`."""
import pytest

FIGURES = pytest.StashKey[list[tuple[str, dict]]]()


def pytest_configure(config):
    config.stash[FIGURES] = []


@pytest.fixture(autouse=True)
def figures(request):
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None and benchmark.extra_info:
        request.config.stash[FIGURES].append((request.node.name, benchmark.extra_info))


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[FIGURES]
    if not rows:
        return
    terminalreporter.section("figures")
    width = max(len(name) for name, _ in rows)
    for name, figures in rows:
        text = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in figures.items())
        terminalreporter.write_line(f"{name:<{width}}  {text}")

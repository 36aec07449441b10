"""The command line.  Commands are imported when they are asked for; typer and rich belong to the extra "cli"."""
import importlib
import sys
from typing import Any

from ..errors import MissingExtraError

# Command -> (module, function), or a group of such.  The function's signature and docstring are the command's options
# and help.
COMMANDS: "dict[str, tuple[str, str] | dict[str, tuple[str, str]]]" = {
    "bench": ("bench", "bench"),
    "demo": ("demo", "demo"),
    "migrate": {"serve": ("migrate", "serve"), "send": ("migrate", "send"), "status": ("migrate", "status"),
                "cancel": ("migrate", "cancel")},
    "probe": ("probe", "probe"),
    "snapshot": {"save": ("snapshot", "save"), "load": ("snapshot", "load"), "show": ("snapshot", "show")},
    "trace": {"record": ("trace", "record"), "show": ("trace", "show"), "replay": ("trace", "play")},
    "update": ("update", "update"),
}
#: What a group of commands is for.
HELP = {"migrate": "Move a guest to another process or machine.",
        "snapshot": "Save guest memory to a file, and load it.",
        "trace": "Which pages a guest writes: record it, look at it, play it against a link."}


def _app(names):
    try:
        import typer
    except ImportError:
        raise MissingExtraError("typer", "cli") from None
    options: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}

    def fill(app, commands):
        for name, target in commands.items():
            if isinstance(target, dict):
                group = typer.Typer(**options)
                fill(group, target)
                app.add_typer(group, name=name, help=HELP[name])
            else:
                app.command(name)(getattr(importlib.import_module(f".{target[0]}", __name__), target[1]))
        app.callback()(lambda: None)        # a lone command still has to be named
        return app

    def show(wanted: bool) -> None:
        if wanted:
            from .. import __version__
            print(f"vfiodma {__version__}")
            raise typer.Exit

    version = typer.Option(False, "--version", help="Show the version, and end.", is_eager=True, callback=show)
    app = fill(typer.Typer(name="vfiodma", **options), {name: COMMANDS[name] for name in names})

    @app.callback(help="DMA mapping and live migration over VFIO.")
    def top(version: bool = version) -> None:
        pass
    return app


def main() -> None:
    """Run ``vfiodma``; a failure ends with its message and status 1, a missing extra with status 2, Ctrl-C with 130."""
    asked = [word for word in sys.argv[1:2] if word in COMMANDS]
    try:
        _app(asked or list(COMMANDS))()
    except KeyboardInterrupt:       # while modules are imported; typer takes the others
        sys.exit(130)
    except MissingExtraError as exc:
        print(f"vfiodma: {exc}", file=sys.stderr)
        sys.exit(2)
    except OSError as exc:          # VfioError, or what a file system says
        print(f"vfiodma: {exc}", file=sys.stderr)
        sys.exit(1)

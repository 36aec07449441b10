"""The command line.  Commands are imported when they are asked for; typer and rich belong to the extra "cli"."""
import importlib
import sys

from ..errors import MissingExtraError, VfioError

# Command -> (module, function).  The function's signature and docstring are the command's options and help.
COMMANDS = {
    "demo": ("demo", "demo"),
    "probe": ("probe", "probe"),
}


def _app(names):
    try:
        import typer
    except ImportError:
        raise MissingExtraError("typer", "cli") from None
    app = typer.Typer(name="vfiodma", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                      help="DMA mapping and live migration over VFIO.")
    for name in names:
        module, function = COMMANDS[name]
        app.command(name)(getattr(importlib.import_module(f".{module}", __name__), function))
    app.callback()(lambda: None)        # a lone command still has to be named
    return app


def main() -> None:
    """Run ``vfiodma``; a failure ends with its message and status 1, a missing extra with status 2."""
    asked = [word for word in sys.argv[1:2] if word in COMMANDS]
    try:
        _app(asked or list(COMMANDS))()
    except MissingExtraError as exc:
        print(f"vfiodma: {exc}", file=sys.stderr)
        sys.exit(2)
    except VfioError as exc:
        print(f"vfiodma: {exc}", file=sys.stderr)
        sys.exit(1)

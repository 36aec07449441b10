"""``python -m vfiodma``: the command line."""
from .cli import main

main()

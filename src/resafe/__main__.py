"""`python -m resafe`: the command line."""

from resafe.cli import main

main()

"""Runs the command line by `python -m plprune`."""

from plprune.cli import main

main()

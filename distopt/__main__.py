"""`python -m distopt`: the command line, see `distopt.cli`."""

from distopt.cli import main

main()

"""`python -m distopt`: the command line, see `distopt.cli`."""

from distopt.cli import main
from distopt.comm.ending import leave

main()
leave()

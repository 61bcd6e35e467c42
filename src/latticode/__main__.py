"""`python -m latticode`: the command line."""

from latticode.cli.main import main

main()

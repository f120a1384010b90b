"""`python -m jobs` is the command `shoal`."""

from jobs.cli import main

main()

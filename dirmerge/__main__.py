"""`python -m dirmerge`."""

from dirmerge.cli import main

main()

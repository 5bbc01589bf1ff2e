"""`python -m attnrt`: the command line."""

from attnrt.cli import main

main()

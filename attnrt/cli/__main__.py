"""`python -m attnrt.cli`: the command line."""

from attnrt.cli import main

main()

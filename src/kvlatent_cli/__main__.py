"""`python -m kvlatent_cli` is the `kvlatent` command."""

from .main import main

main()

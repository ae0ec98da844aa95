"""`python -m hubfusion` is the `hubfusion` command."""

from hubfusion.cli import main

main()

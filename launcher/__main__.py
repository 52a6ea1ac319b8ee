"""`python -m launcher` is `launcher`."""

from launcher.cli.app import main

main()

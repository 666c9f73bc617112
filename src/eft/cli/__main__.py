"""`python -m eft.cli`: what launchers start in every process."""

from __future__ import annotations

from eft.cli.app import main

if __name__ == "__main__":
    main()

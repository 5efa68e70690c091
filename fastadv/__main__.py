"""`python -m fastadv`: the command `fastadv`. Without arguments it needs torch alone, and lists the backends."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the arguments name; with none, print what is available here."""
    if len(sys.argv) > 1:
        from fastadv.cli import main as command

        command()
    else:
        from fastadv import available

        print(available.report())


if __name__ == "__main__":
    main()

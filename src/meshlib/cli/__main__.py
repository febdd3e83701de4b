"""`python -m meshlib.cli` is `meshlib`. Decides nothing, and never runs when it is only imported."""

import sys

from meshlib.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m narrows``: the same as the ``narrows`` command."""

import sys

from narrows.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

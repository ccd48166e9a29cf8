"""`python -m hornet_lit` is `hornet-lit`."""

import sys

from hornet_lit.cli import main

if __name__ == "__main__":
    sys.exit(main())

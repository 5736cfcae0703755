"""`python -m functional_optimodules`: the same as the command `functional-optimodules`."""

import sys

from functional_optimodules.cli import main

if __name__ == "__main__":
    sys.exit(main())

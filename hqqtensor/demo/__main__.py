"""``python -m hqqtensor.demo``."""

import sys

from hqqtensor.demo import main

if __name__ == "__main__":
    sys.exit(main())

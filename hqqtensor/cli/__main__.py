"""``python -m hqqtensor.cli``."""

import sys

from hqqtensor.cli import main

sys.exit(main())

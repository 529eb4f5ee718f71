"""``python -m hqqtensor``: the ``hqqtensor`` command."""

import sys

from hqqtensor.cli import main

sys.exit(main())

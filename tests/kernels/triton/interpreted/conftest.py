"""These tests need TRITON_INTERPRET=1 from the start; ``test_triton_interpreted.py`` runs them in such a process."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]

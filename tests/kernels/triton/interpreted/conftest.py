"""These tests need TRITON_INTERPRET=1 from the start of the process; ``test_triton_interpreted.py`` starts one for them."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]

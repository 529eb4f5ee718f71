"""Property tests try the same examples in every run of CI, others elsewhere: what they find is mended first."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

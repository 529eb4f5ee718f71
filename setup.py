"""Builds the CPU kernels; everything else is in pyproject.toml. Needs torch: `pip install --no-build-isolation`."""

import os
from pathlib import Path

from setuptools import setup

if os.environ.get("HQQTENSOR_NO_KERNELS") == "1":  # the plain path alone
    setup()
else:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            "hqqtensor's CPU kernels are compiled against torch: install torch first and pass --no-build-isolation "
            "(or set HQQTENSOR_NO_KERNELS=1 to go without them)"
        ) from error

    folder = Path("hqqtensor/kernels/cpu")
    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags += ["-iquote", str(folder.resolve())]
    if os.environ.get("HQQTENSOR_SANITIZE") == "1":  # `make sanitize`
        flags[:2] = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=alignment"]
    setup(
        ext_modules=[
            CppExtension(
                "hqqtensor.kernels.cpu._C",
                sorted(str(path) for path in folder.rglob("*.cpp")),
                depends=sorted(str(path) for path in folder.rglob("*.h")),
                extra_compile_args=flags,
                extra_link_args=[f for f in flags if f.startswith(("-fopenmp", "-fsanitize"))],
            )
        ],
        cmdclass={"build_ext": BuildExtension},
    )

from pathlib import Path
from typing import Any

import pytest
from doclm_models import load

from hqqtensor import HqqConfig


@pytest.fixture(scope="session")
def model() -> Any:
    return load(quantization_config=HqqConfig(4, 64), device_map="cpu")


@pytest.fixture(scope="session")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory

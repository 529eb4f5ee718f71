"""What makes hqqtensor at home in other libraries. Nothing here imports one of them before the user does."""

from torchao.core.config import ALLOWED_AO_MODULES

from hqqtensor.integrations import accelerate, peft, torchao, transformers


def register_when_imported() -> None:
    """Register with each library as soon as the user imports it."""
    transformers.register_when_imported()
    peft.register_when_imported()
    accelerate.register_when_imported()
    torchao.register_when_imported()
    ALLOWED_AO_MODULES.add("hqqtensor.integrations.vllm")  # torchao imports it when it meets a config of ours

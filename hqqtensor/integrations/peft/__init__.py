"""PEFT: LoRA and DoRA over quantized weights, with merging.

``import hqqtensor`` registers this as soon as peft is imported, before or after; it does not import peft.
``register()`` does it at once.
"""

from hqqtensor.import_hook import when_imported


def register() -> None:
    """Import peft and register with it; may be called any number of times."""
    import peft.tuners.lora.model
    import peft.utils.integrations  # noqa: F401  both hooks have run, or run now

    _install_dequantize()
    _install_lora()


def register_when_imported() -> None:
    """Register as soon as the user imports peft; costs nothing where it is never imported."""
    when_imported("peft.utils.integrations", _install_dequantize)
    when_imported("peft.tuners.lora.model", _install_lora)


def _install_dequantize() -> None:
    from hqqtensor.integrations.peft import dequantize

    dequantize.install()


def _install_lora() -> None:
    import hqqtensor.integrations.peft.lora  # noqa: F401  installs itself as it is imported

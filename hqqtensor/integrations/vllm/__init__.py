"""vLLM: ``vllm serve DIR`` and ``LLM(DIR)`` take a directory that hqqtensor wrote, and quantize dense ones on request.

vLLM calls ``register``, an entry point of the group "vllm.general_plugins", in each of its processes. ``files`` gives
vLLM's loader whole HQQTensors in place of their packed parts. The methods of ``linear``, ``embedding`` and ``experts``
collect them, cut out what belongs to the process (``slices``) and run it (``parts``).
"""


def register() -> None:
    """Register the quantization method "hqqtensor" with vLLM; may be called any number of times.

    ImportError without vLLM. ``patches.PatchError`` if this version of vLLM lacks what has to be changed.
    """
    from hqqtensor import registration

    registration.register()
    from hqqtensor.integrations.vllm import config  # imports vLLM

    config.install()

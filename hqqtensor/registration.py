"""What torch, torchao and other libraries must know of hqqtensor before they meet its tensors."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@functools.cache
def register() -> None:
    """Import torch, torchao and the core of hqqtensor, and register with them; the second call does nothing.

    Registered are the operators ``torch.ops.hqqtensor.*``, HQQTensor with ``torch.load(weights_only=True)``, HqqConfig
    with torchao's ``quantize_``, and the hooks that run when another library is imported.
    """
    with without_torchao_notes():
        import torchao  # noqa: F401
    # Modules register as they are imported. ops comes first: the kernels that it imports need it.
    import hqqtensor.ops
    import hqqtensor.quantize  # noqa: F401
    from hqqtensor.integrations import register_when_imported

    register_when_imported()


@contextmanager
def without_torchao_notes() -> Iterator[None]:
    """Log as debug what torchao's import warns of and no user of hqqtensor can mend.

    These are its libraries for other processors that do not load here, and its call of a deprecated function of torch.
    All other messages pass, and so do these where the user imports torchao.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(_pass)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_pass)


def _pass(record: logging.LogRecord) -> bool:
    """Whether the record is to be logged; a note of torchao becomes a debug message."""
    if not _is_torchao_note(record):
        return True
    record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def _is_torchao_note(record: logging.LogRecord) -> bool:
    if record.name == "torchao":
        return str(record.msg).startswith("Failed to load ")
    subject = record.args[0] if isinstance(record.args, tuple) and record.args else None
    of_torchao = getattr(subject, "__module__", "").partition(".")[0] == "torchao"
    return of_torchao and str(record.msg).startswith("%s is an Enum subclass and is now natively supported")

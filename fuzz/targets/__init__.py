"""Every way into hqqtensor as a target, by name."""

from fuzz.target import Target
from fuzz.targets import checkpoints, gguf_files, operators, others, records, stored_tensors, streams

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (checkpoints, others, gguf_files, stored_tensors, operators, records, streams)
    for target in module.TARGETS
}

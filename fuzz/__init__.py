"""Mutated inputs for every way into hqqtensor: ``python -m fuzz --target gguf --seconds 600``.

A target makes a mutated input of a number, and reads it as a user would. Each must end in a right answer or in one of
the documented errors, within limits of memory and time. Inputs run in a child process, so a crash is a finding that
names its input, not the end of the run.
"""

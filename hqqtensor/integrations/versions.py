"""Versions of other libraries with which what ``hqqtensor.integrations`` changes in them was tested last."""

ACCELERATE = "1.15.0"
PEFT = "0.21.2"
TORCH = "2.13.0"
TORCHAO = "0.18.0"
TRANSFORMERS = "5.23.0"
VLLM = "0.32.0"

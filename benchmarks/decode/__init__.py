"""Whole-model decode: a Llama with random weights in transformers, and the same in a GGUF file for llama.cpp."""

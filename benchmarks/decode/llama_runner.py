"""llama.cpp on a GGUF file, through its C interface: no tokenizer, no sampling."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor


class LlamaRunner:
    """As ``TorchRunner``. ``length`` is the context in tokens."""

    kind = "llama.cpp"

    def __init__(self, name: str, path: Path, nbytes: int, vocab: int, length: int) -> None:
        import llama_cpp as lib

        self.name, self.nbytes, self.vocab, self.lib = name, nbytes, vocab, lib
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = lib.llama_get_memory(self.context)

    def _run(self, tokens: list[int]) -> Tensor:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        raw = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab)).contents
        return torch.frombuffer(raw, dtype=torch.float32)

    def prefill(self, tokens: list[int]) -> Tensor:
        self.rewind(0)
        return self._run(tokens)

    def step(self, token: int) -> Tensor:
        return self._run([token])

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

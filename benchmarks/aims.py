"""What was aimed at, what was measured, and whether that holds."""

from typing import Any

from hqqtensor.diagnostics.table import text_table


def aim(text: str, measured: str, passed: bool) -> dict[str, Any]:
    """A line of a verdict, as it goes into JSON."""
    return {"aim": text, "measured": measured, "pass": bool(passed)}


def show(lines: list[dict[str, Any]]) -> None:
    """Print a verdict; nothing where there is no line."""
    if lines:
        rows = [(line["aim"], line["measured"], "pass" if line["pass"] else "FAIL") for line in lines]
        print(f"\nVerdict\n{text_table(('', 'measured', ''), rows)}", flush=True)

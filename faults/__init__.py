"""Faults on purpose: every call of a save goes wrong once, every large request for memory is refused once, and what is
left is looked at (docs/reliability.md).

``python -m faults`` runs all of it and prints a table; ``python -m faults.soak`` runs everything at once for minutes.
"""

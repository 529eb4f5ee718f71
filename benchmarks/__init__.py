"""One command each: ``python -m benchmarks.NAME``. Answers are checked before anything is timed."""

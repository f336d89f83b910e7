"""The modules behind the scripts; the README lists them."""

__version__ = "0.2.0"  # of the project; in every checkpoint, metrics.jsonl and report.md

"""The parts behind the scripts: one room for each idea, listed in the README's file map."""

__version__ = "0.2.0"  # of the project; in every checkpoint, metrics.jsonl and report.md

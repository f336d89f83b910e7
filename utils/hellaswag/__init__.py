"""HellaSwag's files, tokenization and results; the scoring itself is in eval_hellaswag.py."""

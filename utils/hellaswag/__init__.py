"""HellaSwag's files, examples and results."""

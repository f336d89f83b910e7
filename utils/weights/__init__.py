"""Files of weights: checkpoints, and other projects' formats."""

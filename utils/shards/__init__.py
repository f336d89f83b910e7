"""Documents to tokens to shards, and back to one stream."""

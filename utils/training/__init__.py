"""What a long run needs around its loop."""

"""The parts behind the scripts: one room for each idea, listed in the README's file map."""

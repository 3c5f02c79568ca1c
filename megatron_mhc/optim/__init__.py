"""Parameter groups of the mappings, and learning rates that fall in steps."""

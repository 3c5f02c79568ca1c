"""What a value may be, and how a run that is given a wrong one ends."""

"""What a checkpoint holds, read without running its code, and whether it fits a run."""

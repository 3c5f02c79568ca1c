"""The process around a run: its device, its peers, its locks and its end."""

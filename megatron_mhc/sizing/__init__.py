"""Parameters, FLOPs and memory of a model, by formula."""

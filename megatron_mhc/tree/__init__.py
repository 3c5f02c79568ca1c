"""The seams in a user's own Megatron tree."""

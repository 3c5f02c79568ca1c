"""The mHC paper's models, and published hybrid ones."""

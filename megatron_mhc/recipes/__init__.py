"""The mHC paper's models."""

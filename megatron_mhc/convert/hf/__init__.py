"""Models for Hugging Face transformers, and back."""

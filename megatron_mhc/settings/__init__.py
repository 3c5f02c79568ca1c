"""Settings, the flags that set them, and the combinations that are refused."""

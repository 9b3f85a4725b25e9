"""Low-bit vision transformers from their FP32 checkpoint."""

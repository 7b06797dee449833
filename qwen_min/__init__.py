"""A minimal pure-PyTorch reference implementation of Qwen for text classification."""

"""Held-out losses, pure language model, by domain."""

"""Parity with Hugging Face: two sides of a comparison, what each computed, and why they differ."""

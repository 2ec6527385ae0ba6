"""All that knows transformers."""

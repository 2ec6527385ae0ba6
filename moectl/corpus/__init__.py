"""From raw text to prepared data: sources, split, tokenizer, packing, manifest, loader."""

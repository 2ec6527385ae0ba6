"""The loop and what makes it trustworthy: checkpoints, exact resume, collapse detection, diagnosis."""

"""Which mistake is it? What every hypothesis would compute, beside what the candidate computed."""

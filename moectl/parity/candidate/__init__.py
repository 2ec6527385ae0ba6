"""Somebody else's code as a side of the comparison: loaded, built, called, mapped and listened to."""

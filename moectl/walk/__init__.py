"""The walk itself: each module joins services into one step that a command can take."""

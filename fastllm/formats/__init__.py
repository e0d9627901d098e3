"""Models on disk: where they come from, what is in them, and how their text becomes tokens."""

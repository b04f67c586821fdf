"""One file per format that other programs read: each writes it, and says what it refuses and why."""

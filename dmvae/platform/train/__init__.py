"""Ray Train runs."""

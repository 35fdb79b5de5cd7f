"""The settings of every part, one file a section; nothing here imports torch."""

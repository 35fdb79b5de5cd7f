"""The settings of every command, one file per section, and how they are read from TOML and flags.

Everything else may import this folder; it imports nothing of the project, and neither torch nor numpy, so that
`--help` is fast.
"""

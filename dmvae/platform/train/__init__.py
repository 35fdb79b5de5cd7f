"""Training runs: a driver starts Ray workers, which train from the newest checkpoint; the run store keeps the results.

May be imported by `platform.tune` and the command line; imports evaluation, tracking and everything below the platform.
"""

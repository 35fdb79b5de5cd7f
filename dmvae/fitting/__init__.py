"""From Python objects to a fitted model and back, in this process: `dmvae.fit` and what it returns.

It may import everything below. It calls the platform only for what was asked for: workers, tracking, a report.
"""

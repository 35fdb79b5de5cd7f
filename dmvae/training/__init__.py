"""Training: the loop in plain torch, its state, validation and checkpoints.

It may import model and below, and knows neither Ray nor MLflow: `Collectives` is all that it asks of other workers.
Only platform may import it.
"""

"""Runs in MLflow, through an outbox that survives outages."""

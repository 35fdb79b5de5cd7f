"""Runs in MLflow: metrics are written to an outbox on disk first, and delivered in the background or later.

May be imported by the rest of the platform; imports only the cluster, folders and resume rules.
"""

"""Registered models: promotion, serving and embedding."""

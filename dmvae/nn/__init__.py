"""Networks: encoders and decoders, and what runs several small ones as one.

It may import distributions and below; model and everything above may import it.
"""

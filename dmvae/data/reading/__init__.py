"""Read a dataset as batches, in an order that does not depend on the number of workers.

It imports `storage` and `format`, but not `preparation`.
`inspection` and every folder above `dmvae.data` may import it.
"""

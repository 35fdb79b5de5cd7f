"""The DMVAE: objective, latents, generation, NLL, its folder on disk, and predictions in the data's units.

It may import nn and below; training, evaluation, report and platform may import it. It knows no files of datasets.
"""

"""One module for each kind of source, named after its `source.kind`, with a function `read` that returns a `Stream`.

Its settings are in `dmvae.config.sources`. `arrow_columns` converts columns for several of them.
Only `dmvae.data.preparation` imports these modules.
"""

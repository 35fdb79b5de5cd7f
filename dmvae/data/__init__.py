"""Datasets: folders of Arrow shards with a manifest. Written by `prepare`, read by `dataset`, ordered by `order`."""

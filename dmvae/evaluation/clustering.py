"""Agreement of clusters of the latents with the labels."""

import numpy as np

from dmvae.evaluation.latents import Latents


def cluster_agreement(train: Latents, test: Latents) -> dict[str, float]:
    """Cluster the shared latents and compare the clusters with the labels; both are 1 where they agree.

    k-means finds as many clusters in the training rows as these have labels; labelled test rows are assigned to them.

    Returns:
        `adjusted_rand_index`, 0 for clusters at random, and `normalized_mutual_information`; NaN without labelled rows.

    Raises:
        ValueError: if the rows have no labels.
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("Clusters need scikit-learn. Run pip install 'dmvae[report]'.") from error
    latents, labels = _labelled(train)
    others, others_labels = _labelled(test)
    if not len(labels) or not len(others_labels):
        return dict.fromkeys(("adjusted_rand_index", "normalized_mutual_information"), float("nan"))
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=0).fit(latents).predict(others)
    return {
        "adjusted_rand_index": float(adjusted_rand_score(others_labels, clusters)),
        "normalized_mutual_information": float(normalized_mutual_info_score(others_labels, clusters)),
    }


def _labelled(latents: Latents) -> tuple[np.ndarray, np.ndarray]:
    if latents.labels is None:
        raise ValueError("Cannot compare clusters with labels: the rows have no labels.")
    shared, here = latents.block("shared")
    labels = latents.labels[here]
    return shared[labels >= 0].numpy(), labels[labels >= 0].numpy()

"""Reports: charts and images of a trained model or a dataset, and the HTML page that shows them.

It may import evaluation and below; platform and the command line may import it. matplotlib is imported here only.
"""

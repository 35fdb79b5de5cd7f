"""What a dataset holds, told to a person before anything is trained on it."""

"""A visit to a GPU: a quarter of an hour on a machine that is lent, from which every figure must come home."""

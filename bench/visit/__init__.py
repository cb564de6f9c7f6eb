"""A visit to a GPU: a short benchmark run on a borrowed machine, whose results are brought back in one archive."""

"""Why residual networks: four studies that train and measure networks. ``python -m bench.study`` runs them.

Training belongs here and in ``digits/``, and nowhere else; the studies measure networks, not the speed of engines.
"""

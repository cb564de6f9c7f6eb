"""Why residual networks: four studies that train and measure networks. ``python -m bench.study`` runs them."""

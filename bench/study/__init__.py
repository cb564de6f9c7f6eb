"""Why residual networks: studies that train and measure, run by ``python -m bench.study``."""

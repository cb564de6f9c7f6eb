"""Which kernel runs a convolution, with which configuration: rules, tuned tables and the facts about each GPU.

Pure functions and data. Knows no kernel and launches nothing.
"""

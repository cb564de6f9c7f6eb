"""Choose the kernel of a convolution and its configuration: rules, tuned tables and the facts about each GPU.

Pure functions and data: nothing here depends on a kernel or launches one.
"""

"""oneDNN's C functions, called directly: the copy of oneDNN that is inside torch's own library.

Through torch's operators, oneDNN builds and looks up a convolution at every call, and the result gets new memory. A
primitive that is built once and runs in prepared memory saves that time. The room knows nothing about plans.
"""

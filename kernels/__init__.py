"""Triton kernels for ResNet inference: fused conv + bias + residual + ReLU, stem, head.

Import them as ``fastres.kernels``. The bare name ``kernels`` belongs to a Hugging Face package that ``transformers``
looks for. If the checkout's root is on ``sys.path``, ``import kernels`` finds this folder. It then loads the installed
package instead, or acts as an empty package if none is installed.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _others = [path for path in sys.path if os.path.realpath(path) != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _others)
    if _spec and _spec.loader:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        __path__ = []
        del __file__  # like a folder without modules

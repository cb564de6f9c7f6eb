"""Post-training quantisation of a Plan to 8 bit: the scales of its values and weights, and the steps that use them.

This package works on plans and tensors. ``fastres.quantize`` (:mod:`fastres.calibration`) feeds it with images.
"""

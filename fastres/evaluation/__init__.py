"""``fastres.evaluate`` and ``fastres evaluate``: how accurate and how fast models are on labelled images.

``candidates`` are the models and exported files. The images come from the readers of :mod:`fastres.classification`.
"""

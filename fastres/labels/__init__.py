"""The labels of images: the class of every image of a source, from folders, files, columns or members of tars.

``finding`` decides where the labels are and gives the class of every image. ``files`` reads files of labels, and
``named`` matches their names with images. ``folders``, ``parquet`` and ``tars`` read what a source holds itself, and
``collected`` keeps the labels of many images. What a label means is decided in :mod:`fastres.images.classes`.
"""

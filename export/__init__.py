"""Export models to deployment formats: ONNX, int8 ONNX, ``torch.export`` and server repositories.

An exporter reads the Plan and writes files; nothing in ``fastres`` depends on it but the command line.
"""

if __name__ == "export":
    from fastres.aliases import serve

    serve("export")

"""Export models to deployment formats: ONNX, int8 ONNX, ``torch.export`` and server repositories."""

if __name__ == "export":
    from fastres.aliases import serve

    serve("export")

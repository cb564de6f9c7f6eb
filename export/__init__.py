"""Plan readers that write deployment formats."""

if __name__ == "export":
    from fastres.checkout import serve

    serve("export")

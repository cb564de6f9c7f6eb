"""Plan readers that write deployment formats."""

if __name__ == "export":
    from fastres.aliases import serve

    serve("export")

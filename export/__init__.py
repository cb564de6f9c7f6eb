"""Plan readers that write deployment formats."""

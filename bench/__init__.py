"""Benchmarks that check correctness first and then compare the speed of fastres with the alternatives.

Run ``python -m bench.run`` in a checkout, or ``fastres bench`` anywhere.
"""

if __name__ == "bench":
    from fastres.aliases import serve

    serve("bench")

"""Correctness first, then time: fastres against what else a user could pick.

``python -m bench.run`` in the checkout, ``fastres bench`` anywhere.
"""

if __name__ == "bench":
    from fastres.aliases import serve

    serve("bench")

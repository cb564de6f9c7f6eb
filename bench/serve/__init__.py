"""``fastres bench serve``: a server under load, beside a plain server and LitServe with torchvision's model.

``generator`` makes the load, in a program of its own; ``servers`` starts the servers, of which ``plain`` and
``litserve`` are written as their users write them; ``figures`` turns what happened into numbers, ``tables`` into text
and a drawing, ``command`` is the command line. What a server is made of belongs in ``fastres/serving``.
"""

from fastres.extras import check_dependencies

check_dependencies("bench serve", ["pyarrow", "aiohttp"], "serve,bench")

"""An installation at a glance, for `mollifier status` and `mollifier top`: `look.py` makes the whole of it.

A look costs a bounded number of commands, each of constant time or one page, however much is buffered.
"""

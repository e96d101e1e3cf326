"""Hostile requests by the thousand, against real processes on real servers, with good ones strewn in.

`kinds.py` and `envelopes.py` are the tables of what is sent, `fuzz.py` sends it, `verdict.py` says what
must have come of it.
"""

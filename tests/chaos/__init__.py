"""A storm with faults: real processes under a seeded schedule of them, and a checker of what came out.

`python -m tests.chaos.run --seed N --seconds 600`. The checker (`checker.py`, `rules/`) knows the wire and
the tables of docs/, and imports nothing from the code that it checks.
"""

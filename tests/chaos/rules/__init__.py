"""The rules: each a function from the story to what violates it. `checker.py` has the table of them."""

"""`python -m app.cli` is `mollifier`."""

from app.cli import main

main()

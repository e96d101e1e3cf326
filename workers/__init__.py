"""One module per line of the Procfile, and the only code that imports FastStream."""

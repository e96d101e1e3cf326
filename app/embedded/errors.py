"""What embedded servers complain about."""


class EmbeddedServerError(RuntimeError):
    """An embedded server is not installed, cannot be started or does not stop."""

"""What a user can cause and cure."""


class UserError(RuntimeError):
    """Told as one line that names the culprit and the remedy; exit code 1."""

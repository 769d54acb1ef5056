"""What a user can cause and cure."""


class UserError(RuntimeError):
    """Told as one line that names the culprit and the remedy."""

    exit_code = 1


class TryAgain(UserError):
    """The same may work later without anybody changing anything. sysexits.h calls it EX_TEMPFAIL."""

    exit_code = 75

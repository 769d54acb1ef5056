class LiveError(RuntimeError):
    """What was asked of the live page cannot be done. The message is one line and says what to do instead."""

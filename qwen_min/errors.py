"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake in what the user gave: the message is one line that says what was found, what was
    expected and what to do.

    The commands print it and exit with status 2. Anything else that is raised is a bug and keeps
    its traceback.
    """

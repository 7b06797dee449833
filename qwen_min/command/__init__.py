"""What belongs to a command line: arguments, the task they describe, errors, the terminal."""

"""Everything that reads or writes files. A malformed file is refused in one line."""

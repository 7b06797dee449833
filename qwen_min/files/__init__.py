"""Everything that reads or writes a file, and refuses what is wrong in it."""

"""Result files and data files turned into tables and pictures."""

"""Experiments and looks inside. Each is for one option, and imported only if it is given."""

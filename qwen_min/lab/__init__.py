"""Experiments and looks inside, each for one option or method; imported only when asked for."""

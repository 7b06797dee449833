"""The default computation: exactly what the mechanics define, faster. Tests hold both equal."""

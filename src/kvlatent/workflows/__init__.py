"""The commands as functions: steps of the packages below, in order."""

"""The `kvlatent` command.

A package of its own: importing `kvlatent` registers model classes and so loads torch, which `kvlatent --help` must not
wait for. The commands import it when they run. Only this package prints: data on stdout, the rest on stderr.
"""

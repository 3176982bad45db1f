"""The application: what a person runs on their own data, from the command line.

For bad input, every function raises :class:`jaxrobust.InputError` with one line that names the
argument, its value and what was expected; the command line prints it and exits with status 2.
"""

"""Helpers for all packages, independent of recursion. Imports only `errors`.

`atomic.py` (atomic writes), `device.py`, `distributed.py` (jobs shared by several processes), `files.py` (read JSON), `log.py` (logging of
commands), `machine.py` (hardware and versions of a measurement), `models.py` (recursive and plain models), `options.py` (flags of several
commands), `typed.py` (convert YAML and JSON values to the types of settings).
"""

"""Small things that every room may use, and that know nothing of recursion: devices, processes, files, words of errors.

Imports nothing of ours but `errors`. One file for each thing: `atomic.py` (files and folders that are whole or not there),
`distributed.py` (work shared by several processes), `device.py`, `machine.py` (where and with which versions something was measured),
`files.py` (JSON, read), `options.py` (flags of commands in several rooms), `models.py` (what holds for recursive and plain models alike),
`typed.py` (a value from YAML or JSON as the type of a settings field).
"""

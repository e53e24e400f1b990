"""What a user chooses from by name: a table for each list, which analyses, command line, pages and docs read.

Nothing comes in, and tables of plain words go out. It imports nothing heavy, so that `hooked-llava --help` is quick; the
functions that an entry names are imported when they are called.
"""

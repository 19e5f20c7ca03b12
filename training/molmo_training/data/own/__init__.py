"""A user's own data: files and folders as tables of rows, checked and shown before a run.

schema         the fields of a row, and the style that follows from them
table          a file or folder as rows, their media found
jsonl, arrow   the readers
"""

"""A user's own data: files and folders as tables of rows, checked and shown before a run.

schema           the fields of a row, and the style that follows from them
table            a file or folder as rows, their media found
jsonl, arrow     the readers
examine          one row: what is wrong with it, how long it is
media, places    what `examine` finds out about files, and about points and tracks
check            whole files: findings, sizes, packs, shares
view, of_run     which examples and packs are shown; `page` is how
model_view       the tokenizer, geometry and settings with which rows are seen
commands         `molmo data`
"""

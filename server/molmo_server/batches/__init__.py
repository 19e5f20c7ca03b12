"""Files of requests, answered in the background: OpenAI's files and batches.

upload   a form with a file, written to disk as it arrives
lines    the format of both files: what is asked, what is answered
folder   the folder on disk: a database, files, one server
files    files by tenant: quota, time
pages    files and batches, page by page
jobs     batches by tenant: their states, the answers of their lines
results  the files of answers, from the answers of lines
asking   a line as a request to this application
runner   which line is next, patience, what happens after a crash
"""

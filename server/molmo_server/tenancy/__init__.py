"""Who may ask, how much, and what they used; only where `MOLMO_KEYS` names a file of keys.

store     keys and usage in SQLite, the same file for the server and `molmo keys`
callers   one request's caller: limits of the key, what the request used
access    the check before every route, what changed in the file, usage written behind
commands  `molmo keys`

A *tenant* is the name that keys are made for; it may have two keys, to change one for the other.
"""

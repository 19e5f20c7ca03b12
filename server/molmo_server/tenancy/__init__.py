"""Who may ask, how much, and what they used; only where `MOLMO_KEYS` names keys.

store     keys and usage, the same for the server and `molmo keys`
databases where they are: a file, or a database that several servers share
callers   one request's caller: limits of the key, what the request used
shared_limits   limits that several servers count together
access    the check before every route, what changed in the file, usage written behind
commands  `molmo keys`

A *tenant* is the name that keys are made for; it may have two keys, to change one for the other.
"""

"""Evaluations against a running server: tasks, metrics, a runner that resumes, reports.

task     samples, scores, groups, and the register of tasks
tasks    the tasks
metrics  numbers from predictions and truths
runner   asks the samples; log keeps the outcomes
report   rows, table, JSON
commands `molmo eval`

Knows: a server's address. Does not know: models, engines; it asks over HTTP only.
"""

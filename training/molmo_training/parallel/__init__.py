"""Many processes as one: who has what (`mesh`), weights split, a sequence split.

Gradients are sums over all ranks, whichever way: each rank goes backward from the part of the
step's loss that it has, divided by the weights of the whole step, and nothing else is scaled.
"""

"""Which checkpoint is served.

folder      what the gateway knows of a checkpoint folder: id, geometry, tokenizer, tensor shapes
live        what is served now, and what was tried
rollout     how another checkpoint comes to be served, and which way
every_engine  another checkpoint in all engines of a pool, or in none
local       a checkpoint of the store on this machine: brought, verified, converted
fit         whether weights fit a running engine, and two engines the memory
blue_green  a second engine beside the first: started, examined, in its place
configured  store, first checkpoint and plan, from the settings
following   what becomes current in the store is served, and the store told of it
"""

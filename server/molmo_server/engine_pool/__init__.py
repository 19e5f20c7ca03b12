"""Engines as the gateway sees them: servers that speak vLLM's chat API over HTTP.

answer      one connection to an engine, and the answers that come on it
wire        HTTP to one engine: where it is, requests, connections that are kept
exchange    one request to an engine: reply, what failures mean
remote      RemoteEngine: one engine at a Unix socket or URL; health and readiness
supervisor  SupervisedEngine: the same, of which the process is ours: start, restart, kill, drain
watchdog    the small parent process that ends an engine when the gateway is gone
pool        EnginePool: engines that come and go; one retry before the first byte
routing     which of several is asked: same medium, same engine
breaker     how far an engine that breaks on requests is still trusted
probing     whether an engine answers as its checkpoint's publisher computed
trial       Trial: an engine beside the others, and what is seen of it
swap        other weights under a running engine, checked before it takes requests again
fake        a scripted engine for tests

What runs inside an engine process is the package `molmo_server.engine`.
"""

from molmo_server.engine_pool.exchange import EngineReply
from molmo_server.engine_pool.pool import EnginePool
from molmo_server.engine_pool.remote import EngineState, EngineTiming, RemoteEngine
from molmo_server.engine_pool.supervisor import EngineProcess, RestartPolicy, SupervisedEngine
from molmo_server.engine_pool.trial import Trial
from molmo_server.engine_pool.wire import EngineAddress

__all__ = [
    "EngineAddress",
    "EnginePool",
    "EngineProcess",
    "EngineReply",
    "EngineState",
    "EngineTiming",
    "RemoteEngine",
    "RestartPolicy",
    "SupervisedEngine",
    "Trial",
]

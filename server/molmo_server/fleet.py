"""The engines of a running service, as operators and autoscalers change them.

Knows: which engines there are, whose they are, what may be done with them. Does not know: HTTP,
how an engine starts or is looked after (`engine_pool`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molmo_core.errors import InvalidRequest, NotFound
from molmo_server.checkpoints.following import StoreFollower
from molmo_server.checkpoints.local import LocalCheckpoints
from molmo_server.checkpoints.rollout import Rollout
from molmo_server.engine_pool import EnginePool, RemoteEngine, SupervisedEngine
from molmo_server.engines import remote_engine
from molmo_server.gateway import Gateway
from molmo_server.setting_rules import checked_engine_url


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model with what changes its engines and checkpoints."""

    gateway: Gateway
    rollout: Rollout
    follower: StoreFollower | None = None
    local: LocalCheckpoints | None = None

    @property
    def name(self) -> str:
        return self.gateway.settings.served_name

    @property
    def engines(self) -> EnginePool:
        return self.gateway.engines


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    name: str
    model: str
    url: str
    """Empty for a process of our own."""
    checkpoint: str
    state: str
    reason: str
    breaker: str
    in_flight: int
    restarts: int


class Fleet:
    """All methods raise NotFound for a name that is not there, Busy while weights are changed."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = tuple(models)

    @property
    def n_ready(self) -> int:
        return sum(engine.ready.is_set() for _, engine in self._members())

    def reports(self) -> list[EngineReport]:
        return [_report(model, engine) for model, engine in self._members()]

    def model(self, name: str | None) -> ServedModel:
        """The one of that name, the first for None."""
        for model in self._models:
            if name in (None, model.name):
                return model
        names = ", ".join(model.name for model in self._models)
        raise NotFound(f"there is no model {str(name)[:100]!r}; served are {names}", param="model")

    async def register(self, url: str, model_name: str | None) -> EngineReport:
        """Ask one more engine, as soon as it answers; nothing new when it is known.

        One that tells which checkpoint it has must have what is served. Raises InvalidRequest.
        """
        try:
            address = checked_engine_url(url)
        except ValueError as error:
            raise InvalidRequest(str(error), param="url") from error
        model = self.model(model_name)
        for other, engine in self._members():
            if engine.url == address and other is not model:
                raise InvalidRequest(
                    f"{address} is an engine of {other.name}; remove it there first", param="url"
                )
            if engine.url == address:
                return _report(model, engine)
        async with model.rollout.unchanged():
            engine = remote_engine(model.gateway.settings, address)
            engine.expect(model.gateway.checkpoint.id)
            await model.engines.add(engine)
        return _report(model, engine)

    async def deregister(self, name: str, *, drain_s: float) -> EngineReport:
        """It takes no more requests and leaves. Raises InvalidRequest for a model's last one."""
        model, engine = self._find(name)
        if len(model.engines.engines) == 1:
            raise InvalidRequest(
                f"{name} is the only engine of {model.name}; register another one first, or drain "
                "this one"
            )
        async with model.rollout.unchanged():
            model.engines.remove(engine, drain_s=drain_s)
        return _report(model, engine)

    async def drain(self, name: str, *, drain_s: float) -> EngineReport:
        """It takes no more requests until it is started again; a process of ours ends."""
        model, engine = self._find(name)
        async with model.rollout.unchanged():
            model.engines.drain(engine, drain_s=drain_s)
        return _report(model, engine)

    async def restart(self, name: str, *, drain_s: float) -> EngineReport:
        """A process of ours ends and starts; an engine of others is looked at as if it were new."""
        model, engine = self._find(name)
        async with model.rollout.unchanged():
            model.engines.start_again(engine, drain_s=drain_s)
        return _report(model, engine)

    def _members(self) -> list[tuple[ServedModel, RemoteEngine]]:
        return [(model, engine) for model in self._models for engine in model.engines.engines]

    def _find(self, name: str) -> tuple[ServedModel, RemoteEngine]:
        for model, engine in self._members():
            if engine.name == name:
                return model, engine
        names = ", ".join(engine.name for _, engine in self._members())
        raise NotFound(f"there is no engine {name[:100]!r}; there are {names}")


def _report(model: ServedModel, engine: RemoteEngine) -> EngineReport:
    return EngineReport(
        name=engine.name,
        model=model.name,
        url="" if isinstance(engine, SupervisedEngine) else engine.url,
        checkpoint=engine.checkpoint_id,
        state=engine.state.value,
        reason=engine.reason,
        breaker=engine.breaker.trust.value,
        in_flight=engine.n_in_flight,
        restarts=engine.n_restarts,
    )

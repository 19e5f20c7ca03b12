"""A plan carried out: weights loaded, ranks joined, trained, saved and published.

Knows: the order of these things. Does not know: what a step does (`trainer`), what is on disk
(`runs`), what was asked for (`plan`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molmo_hf.export import save_settings
from molmo_hf.modeling_molmo2 import Molmo2ForConditionalGeneration
from molmo_training import ranks
from molmo_training.checkpoints.adapters import write_adapter_config
from molmo_training.checkpoints.opened import RUN_SETTINGS
from molmo_training.checkpoints.origin import Origin
from molmo_training.compute import device_of, keep_few_kernels
from molmo_training.data.example import Batch
from molmo_training.dropout import Positions, set_dropout
from molmo_training.forward import Forward
from molmo_training.freezing import store_frozen
from molmo_training.launch.filling import fill
from molmo_training.launch.following import Following
from molmo_training.launch.held_out import HeldOutPacks
from molmo_training.launch.plan import Plan, choose_trained
from molmo_training.launch.reading import SharedStream
from molmo_training.parallel.mesh import Mesh, make_mesh
from molmo_training.parallel.sharding import shard_model
from molmo_training.parallel.shared_batches import shared_batches
from molmo_training.recipes import tiny
from molmo_training.runs.comparison import check_same
from molmo_training.runs.meters import Meters, Sink
from molmo_training.runs.run_state import RunState
from molmo_training.runs.stopping import Stopping
from molmo_training.runs.trackers import open_sinks
from molmo_training.train_config import MAY_DIFFER
from molmo_training.trainer import HeldOut, Trainer


def train(plan: Plan, folder: Path) -> Trainer:
    """Carry the plan out in `folder`, going on where that stands. Raises MolmoError."""
    config = plan.config
    if config.compute.n_threads is not None:
        torch.set_num_threads(config.compute.n_threads)
    device_type = device_of(config.compute).type
    if device_type == "cpu":
        keep_few_kernels()
    with ExitStack() as stack:
        local_rank = stack.enter_context(ranks.process_group(device_type))
        mesh = make_mesh(config.parallel, device_type)
        plan.check_ranks(mesh)
        folder.mkdir(parents=True, exist_ok=True)
        following = stack.enter_context(Following(config.saving, folder))
        origin = _origin(plan)
        states = RunState(
            folder,
            keep=config.saving.keep,
            is_async=config.saving.is_async,
            on_saved=following.saved,
            origin=origin,
        )
        stack.callback(states.close)
        saved = states.saved()
        if saved is not None:
            may_differ: tuple[str, ...] = MAY_DIFFER
            if saved.origin is not None and plan.start.opened is not None:
                saved.origin.check(plan.start.opened.folder)  # wherever it lies now
                may_differ += ("model.start",)
            check_same(saved.config, config.document(), may_differ=may_differ)
        stopping = stack.enter_context(Stopping(time_limit_s=config.saving.time_limit_s))
        device = device_of(config.compute, local_rank)
        model, positions = prepared_model(plan, mesh, device)
        if config.model.lora and config.compute.autocast_bf16 and not mesh.is_sharded:
            store_frozen(model)  # under autocast the products are the same
        if ranks.rank() == 0:
            write_settings(plan, folder)
        stream = SharedStream(plan, mesh, None if saved is None else saved.data)
        trainer = _trainer(
            plan,
            mesh,
            model,
            positions,
            stream,
            states=states,
            stop_asked=stopping.agreed,
            show=_unshown,
        )
        trainer.resume()
        if trainer.progress < 1:
            states.check_room(
                model=trainer.model, optimizers=trainer.optimizer.parts, beside=trainer.lessons
            )
        trainer.at.data_shares = {share.dataset: share.share for share in plan.shares}
        first_step = trainer.at.step
        meters = Meters(
            _sinks(plan, folder, first_step), max_steps=config.n_steps, first_step=first_step
        )
        stack.callback(meters.close)
        trainer.show = partial(_tell, meters)
        trainer.run(stream)
    return trainer


def _origin(plan: Plan) -> Origin | None:
    """The checkpoint that keeps what adapters leave as it is."""
    if plan.config.model.lora is None or plan.start.opened is None:
        return None
    return Origin.of(plan.start.opened.folder)


def _tell(meters: Meters, figures: Mapping[str, float]) -> None:
    rest = {name: value for name, value in figures.items() if name != "step"}
    if "loss" in rest:
        meters.log(int(figures["step"]), rest)
    else:  # of held-out data: no time of training is in them
        meters.write(int(figures["step"]), rest)


def _unshown(figures: Mapping[str, float]) -> None:
    """Until the run knows its first step, nothing is shown."""


def prepared_model(
    plan: Plan, mesh: Mesh, device: torch.device
) -> tuple[Molmo2ForConditionalGeneration, Positions | None]:
    """The model as it starts, with what is trained of it, split over the mesh."""
    config, start = plan.config.model, plan.start
    if start.opened is None:
        model = tiny.build_model(plan.config.seed).to(device)
    else:
        with torch.device("meta"):
            model = Molmo2ForConditionalGeneration(start.config)
    choose_trained(model, config, is_tied=start.is_tied)
    positions = set_dropout(
        model, residual=config.residual_dropout, response=config.response_dropout
    )
    shard_model(model, mesh)
    if start.opened is not None:
        fill(model, start.opened.weights, device)
    return model, positions


def write_settings(plan: Plan, folder: Path) -> None:
    """Put beside the run's states what else a checkpoint is made of, unless it is there."""
    settings, start = folder / RUN_SETTINGS, plan.start
    if settings.exists():
        return
    partial = folder / f"{RUN_SETTINGS}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_settings(
        partial,
        config=start.config,
        tokenizer=start.tokenizer,
        images=start.images,
        videos=start.videos,
    )
    if plan.config.model.lora is not None:
        write_adapter_config(partial, plan.config.model.lora)
    partial.rename(settings)


def _trainer(
    plan: Plan,
    mesh: Mesh,
    model: Molmo2ForConditionalGeneration,
    positions: Positions | None,
    stream: SharedStream,
    **parts: Any,
) -> Trainer:
    config, lessons = plan.config, None
    if config.model.object_lessons:
        lessons = tiny.make_lessons(model).to(next(model.parameters()).device)
    forward = Forward(
        model,
        attention="dense" if lessons is not None else config.compute.attention,
        mesh=mesh,
        positions=positions,
    )
    return Trainer(
        model,
        config,
        forward=forward,
        lessons=lessons,
        held_out=[
            HeldOut(name=packs.name, batches=partial(_shared_packs, packs, mesh))
            for packs in plan.held_out
        ],
        data_state=stream.state,
        n_micro_batches=plan.micro_batches(mesh.dp_size),
        n_copies=mesh.cp_size,
        description=config.document(),
        **parts,
    )


def _shared_packs(packs: HeldOutPacks, mesh: Mesh) -> Iterator[Batch]:
    """The held-out batches of this rank's group, made by its first rank."""
    reads = mesh.cp_rank == 0
    return shared_batches(packs.batches(mesh.dp_rank, mesh.dp_size) if reads else None, mesh)


def _sinks(plan: Plan, folder: Path, first_step: int) -> Sequence[Sink]:
    """Rank 0 tells the figures, which are those of all ranks."""
    if ranks.rank():
        return ()
    config = plan.config
    return open_sinks(
        folder,
        max_steps=config.n_steps,
        first_step=first_step,
        tensorboard=config.saving.tensorboard,
        wandb=config.saving.wandb,
        config=config.document(),
    )

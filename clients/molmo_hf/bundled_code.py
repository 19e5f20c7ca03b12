"""The code files that an export carries for readers without this project.

transformers reads code from the flat folder of a checkpoint and follows relative imports. So
each module that the classes need is copied under a flat name and its imports are rewritten.

Knows: which modules those are. Does not know: weights, settings.
"""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path

_MODULES = {
    "molmo_hf.configuration_molmo2": "configuration_molmo2",
    "molmo_hf.modeling_molmo2": "modeling_molmo2",
    "molmo_hf.modeling_molmo2_vision": "modeling_molmo2_vision",
    "molmo_hf.image_processing_molmo2": "image_processing_molmo2",
    "molmo_hf.video_processing_molmo2": "video_processing_molmo2",
    "molmo_hf.video_io": "molmo2_video_io",
    "molmo_hf.processing_molmo2": "processing_molmo2",
    "molmo_core.errors": "molmo2_errors",
    "molmo_core.images": "molmo2_images",
    "molmo_core.pixels": "molmo2_pixels",
    "molmo_core.tokens": "molmo2_tokens",
    "molmo_core.videos": "molmo2_videos",
}
"""Module here → file there, without suffix."""

_OPTIONAL = ("av", "torchcodec")
"""Packages that only video files need; who sends pictures can do without."""

_PROCESSOR = {"AutoProcessor": "processing_molmo2.Molmo2Processor"}
AUTO_MAPS: dict[str, dict[str, str]] = {
    "config.json": {
        "AutoConfig": "configuration_molmo2.Molmo2Config",
        "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration",
    },
    "preprocessor_config.json": {
        "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
        **_PROCESSOR,
    },
    "video_preprocessor_config.json": {
        "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
        **_PROCESSOR,
    },
    "processor_config.json": _PROCESSOR,
}
"""Settings file → its `auto_map`: which class of which bundled file reads it."""


def write_bundled_code(folder: Path) -> None:
    """Write every needed module into the folder.

    transformers 4.57 copies the files that an entry file names itself, and no more; so each file
    names those that it needs through others too.
    """
    sources = {}
    for module, name in _MODULES.items():
        package, _, stem = module.partition(".")
        source = files(package).joinpath(f"{stem}.py").read_text()
        sources[name] = rewrite_imports(source, package)
    for name, source in sources.items():
        indirect = sorted(_needed_by(name, sources) - _named_in(source) - {name})
        naming = [f"    from .{other} import *  # noqa: F403" for other in indirect]
        if naming:
            source += "\n" + "\n".join(["import typing", "", _NAMING, *naming]) + "\n"
        (folder / f"{name}.py").write_text(source)


_NAMING = "if typing.TYPE_CHECKING:  # never run: tells transformers 4.57 which files to copy"


def _named_in(source: str) -> set[str]:
    return set(re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE))


def _needed_by(name: str, sources: dict[str, str]) -> set[str]:
    found: set[str] = set()
    waiting = {name}
    while waiting:
        named = _named_in(sources[waiting.pop()])
        waiting |= named - found
        found |= named
    return found


def rewrite_imports(source: str, package: str) -> str:
    """Make imports of our modules relative and flat, and those of optional packages tolerant.

    Raises ValueError for an import of ours that is not bundled.
    """
    lines = source.splitlines()
    for node in reversed(_imports_outside_try(ast.parse(source))):
        begin, end = node.lineno - 1, node.end_lineno or node.lineno
        lines[begin:end] = _rewritten(node, lines[begin:end], package)
    return "\n".join(lines) + "\n"


def _rewritten(node: ast.Import | ast.ImportFrom, lines: list[str], package: str) -> list[str]:
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
    indent = " " * node.col_offset
    if isinstance(node, ast.ImportFrom) and node.level == 1:
        module = f"{package}.{module}"
    root = module.partition(".")[0]
    if root in ("molmo_core", "molmo_hf"):
        if module not in _MODULES or not isinstance(node, ast.ImportFrom):
            raise ValueError(
                f"line {node.lineno} imports {module}, which is not bundled: add it to _MODULES"
            )
        names = ", ".join(ast.unparse(alias) for alias in node.names)
        return [f"{indent}from .{_MODULES[module]} import {names}"]
    if root in _OPTIONAL:
        bound = [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        return [
            f"{indent}try:",
            *(f"    {line}" for line in lines),
            f"{indent}except ImportError:",
            *(f"{indent}    {name} = None" for name in bound),
        ]
    return lines


def _imports_outside_try(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """In the order of the file; what stands in a `try` is tolerant already."""
    found: list[ast.Import | ast.ImportFrom] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append(child)
        elif not isinstance(child, ast.Try):
            found += _imports_outside_try(child)
    return found

"""The four distributions: what they declare is what they are. Building and installing them is in ``.ci/run``."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MAY_DEPEND_ON = {
    "petals-core": set(),
    "petals-dht": {"petals-core"},
    "petals-server": {"petals-core", "petals-dht"},
    "petals-client": {"petals-core", "petals-dht"},
}
MEMBERS = sorted(MAY_DEPEND_ON)
# Distributions that are imported under another name than their own.
DISTRIBUTION_OF = {"google": "protobuf", "umsgpack": "u-msgpack-python", "yaml": "pyyaml", "PIL": "pillow"}
# The test kit may import what only tests install: nothing else imports the kit.
ONLY_IN_TEST_KIT = {"hypothesis", "pytest", "tokenizers"}
# Imported only where it is in use already: weights that a server has quantized.
ONLY_WHERE_INSTALLED = {("petals-core", "transformers_quantization.py", "bitsandbytes")}
# Where all private names of Transformers are, so that an upgrade breaks one file.
PRIVATE_PARTS = "transformers_private.py"
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def metadata(folder: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return project


def member(name: str) -> dict[str, Any]:
    return metadata(ROOT / "packages" / name)


def requirement_names(name: str) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in member(name)["dependencies"]}


def sources(name: str) -> list[Path]:
    return sorted((ROOT / "packages" / name / "src").rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def test_workspace_has_exactly_the_known_members() -> None:
    assert sorted(path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")) == MEMBERS


def test_versions_are_in_step() -> None:
    assert {member(name)["version"] for name in MEMBERS} == {metadata(ROOT)["version"]}


def test_members_ask_for_the_same_python_and_license() -> None:
    assert {member(name)["requires-python"] for name in MEMBERS} == {metadata(ROOT)["requires-python"]}
    assert {member(name)["license"] for name in MEMBERS} == {"MIT"}
    texts = {(ROOT / "packages" / name / "LICENSE").read_text() for name in MEMBERS}
    assert texts == {(ROOT / "LICENSE").read_text()}


@pytest.mark.parametrize("name", MEMBERS)
def test_dependencies_point_one_way(name: str) -> None:
    assert requirement_names(name) & set(MEMBERS) <= MAY_DEPEND_ON[name]


def test_client_installs_neither_the_server_nor_quantization() -> None:
    wanted, seen = ["petals-client"], set()
    while wanted:
        name = wanted.pop()
        seen.add(name)
        wanted += requirement_names(name) & set(MEMBERS) - seen
        assert not requirement_names(name) & {"bitsandbytes", "petals-server"}, name


def names_used(path: Path) -> Iterator[str]:
    """Names of attributes that a module reads, writes or defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                yield name


@pytest.mark.parametrize("name", MEMBERS)
def test_types_are_published(name: str) -> None:
    assert [path.name for path in (ROOT / "packages" / name / "src").glob("*/py.typed")] == ["py.typed"]


@pytest.mark.parametrize("name", MEMBERS)
def test_everything_imported_is_declared(name: str) -> None:
    """A package that works only because a neighbour installs something breaks when it is installed alone."""
    declared = requirement_names(name)
    undeclared = {
        f"{path.name}: {module}"
        for path in sources(name)
        for module in imported_modules(path)
        if (top := module.partition(".")[0]) not in sys.stdlib_module_names
        and top != name.replace("-", "_")
        and not (top in ONLY_IN_TEST_KIT and "testing" in path.parts)
        and (name, path.name, top) not in ONLY_WHERE_INSTALLED
        and canonicalize_name(DISTRIBUTION_OF.get(top, top)) not in declared
    }
    assert undeclared == set()


@pytest.mark.parametrize("name", MEMBERS)
def test_nothing_is_pickled(name: str) -> None:
    """What a peer or a file holds must never run as code."""
    used = {module.partition(".")[0] for path in sources(name) for module in imported_modules(path)}
    assert not used & FORBIDDEN_MODULES


def test_private_parts_of_transformers_are_touched_in_one_file() -> None:
    touched = {
        (path.name, name)
        for member_name in MEMBERS
        for path in sources(member_name)
        if re.search(r"transformers|petals_core\.models", path.read_text())  # others have names of their own
        for name in names_used(path)
        if name in private_names_of_transformers()
    }
    assert {file for file, _ in touched} == {PRIVATE_PARTS}, touched


@functools.cache
def private_names_of_transformers() -> frozenset[str]:
    """Private attributes of its classes that are not torch's or everybody's, and two that only instances have."""
    kinds = (transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationConfig)
    names = {name for kind in (*kinds, transformers.GenerationMixin, transformers.Cache) for name in dir(kind)}
    names |= {"_attn_implementation", "_pad_token_tensor"}
    return frozenset(
        name for name in names - set(dir(torch.nn.Module())) if name.startswith("_") and not name.startswith("__")
    )


@pytest.mark.parametrize("name", [name for name in MEMBERS if "scripts" in member(name)])
def test_commands_exist(name: str) -> None:
    for command, target in member(name)["scripts"].items():
        module, _, attribute = target.partition(":")
        assert command == name
        assert callable(getattr(importlib.import_module(module), attribute))


def test_every_constraint_is_exact() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    pins = [
        Requirement(text)
        for key in ("constraint-dependencies", "build-constraint-dependencies")
        for text in settings[key]
    ]
    assert [str(pin) for pin in pins if [part.operator for part in pin.specifier] != ["=="]] == []
    pinned = {canonicalize_name(pin.name) for pin in pins}
    assert {needed for name in MEMBERS for needed in requirement_names(name)} - set(MEMBERS) <= pinned

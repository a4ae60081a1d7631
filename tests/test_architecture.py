"""The house's rules: which way imports go, what is loaded when, and what no source may do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Modules that load torch, or what loads it, when they are imported.
WITH_TORCH = {
    *("raise_env.encoding", "raise_env.base_model", "raise_env.evaluation", "raise_env.learner", "raise_env.assets"),
    "raise_env.auxiliary",
    *(
        "raise_env.export",
        "raise_env.model_size",
        "raise_env.packing",
        "raise_env.label_positions",
        "raise_env.causal_attention",
        "raise_env.lora_layers",
        "raise_env.generation",
        "raise_env.adapter_files",
        "raise_env.tiny.pretrain",
        "agents.subset",
        "agents.networks",
        "agents.raise_fork",
        "agents.placebo",
        "agents.estimate",
        "agents.sb3",
    ),
    *("agents.class_law", "agents.raise_ppo", "agents.selector_files"),
    *("agents.sb3_buffer", "agents.sb3_files", "agents.sb3_vector"),
}

HEAVY = ("torch", "transformers", "peft", "datasets", "stable_baselines3", "sb3_contrib", "sklearn", "matplotlib")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for wing in ("raise_env", "agents") for path in (ROOT / wing).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(name, *, at_top_only=False):
    """The modules that a module imports, under one name each; what is for type checkers alone is left out."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    pending = list(TREES[name].body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole in SOURCES else source)
        elif not (at_top_only and isinstance(node, ast.FunctionDef)):
            pending += ast.iter_child_nodes(node)
    return found


def is_of(module, package):
    return module == package or module.startswith(f"{package}.")


def layers():
    """The world's modules in the order of the map in docs/architecture.md, a folder's after each other."""
    section = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The world")[1].split("\n## ")[0]
    named = re.findall(r"^\| `([\w/]+)(?:\.py)?` \|", section, re.MULTILINE)
    tiny = ["tiny", "tiny.skills", "tiny.rows", "tiny.recipes", "tiny.task", "tiny.pretrain"]
    return [layer for name in named if name != "__init__" for layer in (tiny if name == "tiny/" else [name])]


LAYERS = layers()
WORLD = [name for name in SOURCES if is_of(name, "raise_env")]


def test_layers__the_worlds_modules__are_all_named():
    assert {name.removeprefix("raise_env.") for name in WORLD if name != "raise_env"} == set(LAYERS)


@pytest.mark.parametrize("name", [name for name in WORLD if name != "raise_env"])
def test_imports__of_the_world__go_to_layers_above(name):
    place = LAYERS.index(name.removeprefix("raise_env."))
    own = {module.removeprefix("raise_env.") for module in imports(name) if is_of(module, "raise_env")}
    assert own <= set(LAYERS[:place])


@pytest.mark.parametrize("name", WORLD)
def test_imports__of_the_world__never_reach_the_agents(name):
    assert not {module for module in imports(name) if is_of(module, "agents") or is_of(module, "raise_env.agents")}
    assert "raise_env.agents" not in SOURCES[name].read_text(encoding="utf-8")


def test_imports__among_all_modules__have_no_cycles():
    graph = {name: {module for module in imports(name) if module in SOURCES} for name in SOURCES}
    while graph:
        free = {name for name, others in graph.items() if not others & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


def test_imports__at_the_top__load_torch_where_it_is_said():
    with_torch = ("torch", "stable_baselines3")
    loading = {name for name in SOURCES if any(is_of(m, package) for m in closure(name) for package in with_torch)}
    direct = {name for name in SOURCES if {m.split(".")[0] for m in imports(name, at_top_only=True)} & set(HEAVY)}
    assert loading == WITH_TORCH
    assert direct <= WITH_TORCH


def closure(name):
    """Everything that importing a module imports."""
    seen, pending = set(), [name]
    while pending:
        for module in imports(pending.pop(), at_top_only=True) - seen:
            seen.add(module)
            if module in SOURCES:
                pending.append(module)
    return seen


@pytest.mark.parametrize("name", SOURCES)
def test_imports__names_of_other_modules__are_public(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.level or is_of(node.module or "", "raise_env")):
            private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"]
            assert not private, f"{node.module}: {private}"


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"raise_env.tiny.pretrain"}))
def test_source__library__prints_and_seeds_nothing(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "random.seed", "np.random.seed"), called


@pytest.mark.parametrize(
    "name", [n for n in SOURCES if n not in ("agents.__main__", "raise_env.tiny", "raise_env.version")]
)
def test_source__public_names__are_listed_and_there(name):
    tree = TREES[name]
    (listed,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ] or [[]]
    defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assigned = {ast.unparse(t) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    assigned |= {ast.unparse(n.target) for n in tree.body if isinstance(n, ast.AnnAssign)}
    if name not in ("raise_env", "agents"):
        assert set(listed) <= defined | assigned
    assert len(listed) == len(set(listed))


def test_no_utils__among_the_sources__is_to_be_found():
    assert not [name for name in SOURCES if name.rpartition(".")[2] in ("utils", "helpers", "common", "misc")]

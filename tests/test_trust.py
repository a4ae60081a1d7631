"""Files of strangers: nothing in them is run, nothing leads out of them, and none takes more than it is worth.

Each case is a file or folder that means ill, by kind and name. It must be refused as one message, in seconds, and leave
no mark; `pytest -s -k counted` prints how many there are of each kind.
"""

from __future__ import annotations

import ast
import functools
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import jsonl
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file

import raise_env
from raise_env.adapter_files import adapter_settings, read_adapter
from raise_env.agents import cli
from raise_env.agents.catalogue import load_selector
from raise_env.agents.job import check_line
from raise_env.agents.raise_fork import RaiseFork
from raise_env.agents.run_folder import RunFolder, whole_lines, whole_records
from raise_env.agents.sb3_files import SavedModel
from raise_env.agents.validation import read_bench
from raise_env.base_model import BaseModel
from raise_env.config import LoraSettings
from raise_env.errors import (
    DataError,
    ModelError,
    OutputError,
    RaiseEnvError,
    RecordError,
    SettingError,
    printable,
)
from raise_env.frames import ChatFrame, PlainFrame
from raise_env.pool import Instruction
from raise_env.reading import read_pool
from raise_env.record import FOREIGN_LIMITS, EpisodeRecord, read_records, replay
from raise_env.sandbox import BoundedTemplate

ROOT = Path(__file__).resolve().parents[1]
BASE = Path(raise_env.__file__).parent / "tiny" / "base"

#: What refusing may take: far more than it does, for machines that do much else.
SECONDS = 10.0  # of the processor, so that other work on the machine does not count

GOOD_ROWS = jsonl(*({"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(4)))

# The sources

#: Calls that can run code or open pickles, and where one is made: by whom, and why that is no file's doing.
ALLOWED = {
    ("raise_env.__init__", "importlib.import_module"): "its own modules, when a name of theirs is asked for",
    ("agents.__init__", "importlib.import_module"): "likewise",
    ("agents.catalogue", "importlib.import_module"): "agents of this package, and those named by the caller",
    ("agents.sb3", "importlib.import_module"): "the two libraries of algorithms, by names that stand there",
    ("raise_env.rewards", "importlib.import_module"): "a reward named by the caller; a record's is refused",
    ("agents.sb3_files", "torch.load"): "held to plain tensors by weights_only=True",
}

BANNED_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "subprocess", "yaml", "runpy", "code", "imp"}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "joblib.load", "np.load"),
    *("numpy.load", "np.fromregex", "torch.load", "yaml.load", "importlib.import_module", "pd.read_pickle"),
    *("importlib.util.spec_from_file_location", "torch.hub.load", "extractall", "shutil.unpack_archive"),
}

SOURCES = {
    path: ast.parse(path.read_text()) for wing in ("raise_env", "agents") for path in (ROOT / wing).rglob("*.py")
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_banned(called: str) -> bool:
    return called in BANNED_CALLS or called.rpartition(".")[2] in ("extractall", "import_module", "unpickle")


def test_sources__what_runs_code_or_opens_pickles__is_in_few_places_for_a_reason():
    found = set()
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & BANNED_MODULES, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in BANNED_MODULES, path
            elif isinstance(node, ast.Call) and is_banned(called := ast.unparse(node.func)):
                found.add((name_of(path), called))
                if called == "torch.load":
                    assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True"
    assert found == set(ALLOWED)


def test_sources__whatever_is_loaded__is_loaded_without_its_code():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                for name in ("trust_remote_code", "allow_pickle", "shell"):
                    assert given.get(name, "False") == "False", (path, called, name)
                if called.endswith((".from_pretrained", "AutoModelForCausalLM.from_config")):
                    assert "trust_remote_code" in given, (path, called)


def test_sources__archives__are_opened_by_name_alone():
    """Archives of SB3's models are the only ones; two members are read by name, and nothing is unpacked to disk."""
    using = {
        name_of(path) for path, tree in SOURCES.items() if "zipfile" in ast.unparse(tree) or "tarfile" in str(path)
    }
    assert using == {"agents.sb3_files"}
    assert not [path for path, tree in SOURCES.items() if "import tarfile" in ast.unparse(tree)]


# Cases


@dataclass(frozen=True)
class Case:
    """A file that means ill: `make` writes it below a folder and returns what opens it."""

    kind: str
    name: str
    make: Callable[[Path, Path], Callable[[], object]]
    is_ignored: bool = False  # whether it may be passed over, never opened, instead of refused


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "it ran")


def pickles(mark: Path) -> dict[str, bytes]:
    """The forms in which a pickle may come."""
    saved, array, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": Evil(mark)}, saved)
    np.save(array, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    np.savez(arrays, a=np.array([Evil(mark)], dtype=object))
    plain = pickle.dumps(Evil(mark))
    return {
        "pickle": plain,
        "old pickle": pickle.dumps(Evil(mark), protocol=0),
        "torch": saved.getvalue(),
        "npy": array.getvalue(),
        "npz": arrays.getvalue(),
        "gz": gzip.compress(plain),
    }


FORMS = ("pickle", "old pickle", "torch", "npy", "npz", "gz")

OpenFolder = Callable[[Path], object]


def load_model(folder: Path) -> object:
    return BaseModel(str(folder), LoraSettings(r=2), device="cpu")


@functools.cache
def tiny_base() -> BaseModel:
    return BaseModel("tiny", LoraSettings(r=2), device="cpu")


def load_adapter(folder: Path) -> object:
    adapter_settings(folder)
    return read_adapter(folder, tiny_base())


def model_copy(folder: Path) -> Path:
    shutil.copytree(BASE, folder)
    return folder


def adapter_copy(folder: Path) -> Path:
    folder.mkdir()
    tiny_base().save_adapter(tiny_base().initial_parameters(0), folder)
    return folder


def selector_copy(folder: Path) -> Path:
    from raise_env.agents.networks import AcquisitionFunction

    agent = RaiseFork(num_networks=1, hidden_dims=(4,))
    agent.networks = [AcquisitionFunction(39, (4,), generator=torch.Generator())]
    agent.save(folder)
    return folder


def run_copy(folder: Path) -> Path:
    folder.mkdir()
    for name in ("run.json", "results.jsonl", "episodes.jsonl", "summary.json"):
        (folder / name).write_text("{}\n")
    return folder


def open_run(folder: Path) -> object:
    return RunFolder.open(folder, "train", {}, resume=True)


FOLDERS: dict[str, tuple[Callable[[Path], Path], OpenFolder]] = {
    "model": (model_copy, load_model),
    "adapter": (adapter_copy, load_adapter),
    "selector": (selector_copy, load_selector),
    "run": (run_copy, open_run),
    "bench": (run_copy, read_bench),
}


def planted(
    folder_kind: str, file: str, content: bytes, *, without: str = ""
) -> Callable[[Path], Callable[[], object]]:
    """Return what makes a folder of some kind with other content in a file of it, and opens it."""
    copy, opened = FOLDERS[folder_kind]

    def make(place: Path) -> Callable[[], object]:
        folder = copy(place / folder_kind)
        (folder / file).write_bytes(content)
        if without:
            (folder / without).unlink()
        return lambda: opened(folder)

    return make


DATA_NAMES = (
    "jsonl",
    "json",
    "csv",
    "parquet",
    "jsonl.gz",
    "json.gz",
    "csv.gz",
    "npy",
    "npz",
    "pkl",
    "zip",
    "bin",
    "pt",
)

#: Where a pickle is planted: the kind of folder, the file, what is taken away so that it is looked for.
PLANTED = [
    ("model", "config.json", ""),
    ("model", "model.safetensors", ""),
    ("model", "pytorch_model.bin", "model.safetensors"),
    ("model", "tokenizer.json", ""),
    ("model", "tokenizer_config.json", ""),
    ("model", "model.safetensors.index.json", ""),
    ("model", "adapter_config.json", ""),
    ("adapter", "adapter_config.json", ""),
    ("adapter", "adapter_model.safetensors", ""),
    ("adapter", "adapter_model.bin", "adapter_model.safetensors"),
    ("selector", "config.json", ""),
    ("selector", "model.safetensors", ""),
    ("selector", "model.pt", "model.safetensors"),
    ("run", "run.json", ""),
    ("bench", "results.jsonl", ""),
    ("bench", "episodes.jsonl", ""),
]

#: Files that nothing asks for: they lie beside others, and must not be opened.
BYSTANDERS = [
    *(("model", name) for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl")),
    *(("model", name) for name in ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "pytorch_model.bin")),
    *(("adapter", name) for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt")),
    *(("selector", name) for name in ("optimizer.pt", "model.pt")),
]


def pickle_cases() -> list[Case]:
    cases = []
    for form in FORMS:
        for ending in DATA_NAMES:

            def make(place: Path, mark: Path, form: str = form, ending: str = ending) -> Callable[[], object]:
                path = place / f"pool.{ending}"
                content = pickles(mark)[form]
                path.write_bytes(gzip.compress(content) if ending.endswith(".gz") and form != "gz" else content)
                return lambda: read_pool(path)

            cases.append(Case("pickle as data", f"{form} as pool.{ending}", make))
        for kind, file, without in PLANTED:

            def plant(
                place: Path, mark: Path, form: str = form, kind: str = kind, file: str = file, without: str = without
            ) -> Callable[[], object]:
                return planted(kind, file, pickles(mark)[form], without=without)(place)

            cases.append(Case(f"pickle in a {kind}'s folder", f"{form} as {file}", plant))

        def sb3(place: Path, mark: Path, form: str = form) -> Callable[[], object]:
            (place / "ppo.zip").write_bytes(pickles(mark)[form])
            return lambda: SavedModel.read(place / "ppo.zip")

        cases.append(Case("pickle as SB3's model", f"{form} as ppo.zip", sb3))
    for kind, file in BYSTANDERS:

        def beside(place: Path, mark: Path, kind: str = kind, file: str = file) -> Callable[[], object]:
            return planted(kind, file, pickles(mark)["pickle"])(place)

        cases.append(Case("pickle beside what is read", f"{file} of a {kind}", beside, is_ignored=True))
    return cases


# Code


CODE = "from pathlib import Path\nPath({mark!r}).write_text('it ran')\n"


def changed_json(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


def remote_model(place: Path, mark: Path, *, is_known: bool) -> Callable[[], object]:
    folder = model_copy(place / "model")
    code = CODE.format(mark=str(mark)) + "class Config: pass\nclass Model: pass\n"
    (folder / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    changed_json(folder, "config.json", auto_map=auto, **({} if is_known else {"model_type": "evil"}))
    return lambda: load_model(folder)


def remote_tokenizer(place: Path, mark: Path) -> Callable[[], object]:
    folder = model_copy(place / "model")
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)) + "class T: pass\n")
    changed_json(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T")
    return lambda: load_model(folder)


def dataset_script(place: Path, mark: Path) -> Callable[[], object]:
    folder = place / "data"
    folder.mkdir()
    (folder / "data.py").write_text(CODE.format(mark=str(mark)))
    return lambda: read_pool(folder)


def adapter_mapping(place: Path, mark: Path) -> Callable[[], object]:
    folder = adapter_copy(place / "adapter")
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    changed_json(folder, "adapter_config.json", auto_mapping=mapping, base_model_name_or_path=str(place / "elsewhere"))
    return lambda: load_adapter(folder)


def adapter_in_model(place: Path, mark: Path) -> Callable[[], object]:
    folder = model_copy(place / "model")
    changed_json(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(place / "elsewhere"))
    return lambda: load_model(folder)


def says(kind: str, **values: Any) -> Callable[[Path, Path], Callable[[], object]]:
    """A model or an adapter with other values in its configuration."""
    copied, file, load = {
        "model": (model_copy, "config.json", load_model),
        "adapter": (adapter_copy, "adapter_config.json", load_adapter),
    }[kind]

    def make(place: Path, mark: Path) -> Callable[[], object]:
        folder = copied(place / kind)
        changed_json(folder, file, **values)
        return lambda: load(folder)

    return make


def selector_says(settings: dict[str, Any], **values: Any) -> Callable[[Path, Path], Callable[[], object]]:
    def make(place: Path, mark: Path) -> Callable[[], object]:
        folder = selector_copy(place / "selector")
        before = json.loads((folder / "config.json").read_text())["settings"]
        changed_json(folder, "config.json", settings={**before, **settings}, **values)
        return lambda: load_selector(folder)

    return make


CODE_CASES = [
    Case("code named by a file", "model of an unknown kind", functools.partial(remote_model, is_known=False)),
    Case("code named by a file", "model of a known kind", functools.partial(remote_model, is_known=True), True),
    Case("code named by a file", "tokenizer", remote_tokenizer, True),
    Case("code named by a file", "script of a data set", dataset_script),
    Case("code named by a file", "adapter's mapping", adapter_mapping, True),
    Case("code named by a file", "kernel of the hub", says("model", attn_implementation="evil/kernel")),
    Case(
        "code named by a file", "kernel of the hub, inside", says("model", text_config={"_attn_implementation": "e/k"})
    ),
    Case("code named by a file", "experts' kernel of the hub", says("model", experts_implementation="evil/kernel")),
    Case("code named by a file", "selector of an own module", selector_says({}, agent="evil:Agent")),
]


# Paths


def index_of(name: str) -> Callable[[Path, Path], Callable[[], object]]:
    def make(place: Path, mark: Path) -> Callable[[], object]:
        folder = model_copy(place / "model")
        shutil.copy(BASE / "model.safetensors", place / "outside.safetensors")
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name.format(place=place)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return lambda: load_model(folder)

    return make


def tokenizer_file(place: Path, mark: Path) -> Callable[[], object]:
    folder = model_copy(place / "model")
    (place / "secret.json").write_text("{}")
    changed_json(folder, "tokenizer_config.json", tokenizer_file=str(place / "secret.json"))
    return lambda: load_model(folder)


def linked(kind: str, file: str) -> Callable[[Path, Path], Callable[[], object]]:
    """A file of a folder that is a link to somewhere else."""

    def make(place: Path, mark: Path) -> Callable[[], object]:
        copy, opened = FOLDERS[kind]
        folder = copy(place / kind)
        (folder / file).rename(place / "elsewhere")
        (folder / file).symlink_to(place / "elsewhere")
        return lambda: opened(folder)

    return make


def piped(kind: str, file: str) -> Callable[[Path, Path], Callable[[], object]]:
    """A file of a folder that is a pipe, into which nobody writes."""

    def make(place: Path, mark: Path) -> Callable[[], object]:
        copy, opened = FOLDERS[kind]
        folder = copy(place / kind)
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)
        return lambda: opened(folder)

    return make


def piped_data(place: Path, mark: Path) -> Callable[[], object]:
    os.mkfifo(place / "pool.jsonl")
    return lambda: read_pool(place / "pool.jsonl")


PATH_CASES = [
    Case("path that leads out", "index of weights, relative", index_of("../outside.safetensors")),
    Case("path that leads out", "index of weights, absolute", index_of("{place}/outside.safetensors")),
    Case("path that leads out", "index of weights, by a folder", index_of("sub/../../outside.safetensors")),
    Case("path that leads out", "tokenizer's file", tokenizer_file),
    Case("path that leads out", "model with an adapter of elsewhere", adapter_in_model),
    *(
        Case("path that leads out", f"link {file} of a {kind}", linked(kind, file))
        for kind, file in [
            *(("selector", name) for name in ("config.json", "model.safetensors")),
            *(("bench", name) for name in ("results.jsonl", "episodes.jsonl")),
            ("run", "run.json"),
        ]
    ),
    *(
        Case("pipe in place of a file", f"{file} of a {kind}", piped(kind, file))
        for kind, file in [
            *(
                ("model", name)
                for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json")
            ),
            *(("adapter", name) for name in ("adapter_config.json", "adapter_model.safetensors")),
            *(("selector", name) for name in ("config.json", "model.safetensors")),
            *(("bench", name) for name in ("results.jsonl", "episodes.jsonl")),
            ("run", "run.json"),
        ]
    ),
    Case("pipe in place of a file", "pool.jsonl", piped_data),
]


# Sizes


def data_of(name: str, content: Callable[[], bytes]) -> Callable[[Path, Path], Callable[[], object]]:
    def make(place: Path, mark: Path) -> Callable[[], object]:
        (place / name).write_bytes(content())
        return lambda: read_pool(place / name)

    return make


@functools.cache
def ten_gigabytes(byte: bytes) -> bytes:
    """So much of one byte, packed: members of a .gz may follow each other."""
    return gzip.compress(byte * 2**26) * 160


def header_of(size: int, header: bytes) -> bytes:
    return size.to_bytes(8, "little") + header


def tensor_header(shape: list[int], end: int) -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return header_of(len(header), header)


HEADERS = {
    "a header of exabytes": header_of(2**62, b"{}"),
    "a header of a gigabyte": header_of(2**30, b"{}"),
    "a tensor of exabytes": tensor_header([2**31, 2**31], 2**63 - 1),
    "a tensor larger than its bytes": tensor_header([10**6, 10**6], 4),
    "a shape that overflows": tensor_header([2**40, 2**40], 0),
    "a negative shape": tensor_header([-1], 4),
    "a header nested deeply": header_of(200_000, b"[" * 100_000 + b"]" * 100_000),
    "nothing": b"",
}


def row_with(value: str) -> bytes:
    return f'{{"prompt": "a", "response": "b", "extra": {value}}}\n'.encode()


def parquet_of_repeats(place: Path, mark: Path) -> Callable[[], object]:
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array(["x" * 100_000]))
    parquet.write_table(pa.table({"prompt": text, "response": text}), place / "pool.parquet")
    assert (place / "pool.parquet").stat().st_size < 10**6
    return lambda: read_pool(place / "pool.parquet")


def parquet_page(place: Path, mark: Path) -> Callable[[], object]:
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.array(["x" * 2**29])
    parquet.write_table(pa.table({"prompt": text, "response": ["a"]}), place / "pool.parquet", compression="zstd")
    return lambda: read_pool(place / "pool.parquet")


def parquet_extension(place: Path, mark: Path) -> Callable[[], object]:
    """A column that asks for a pickled type, as Arrow before 14.0.1 would have opened it (CVE-2023-47248)."""
    import pyarrow as pa
    from pyarrow import parquet

    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil(mark))}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=metadata), pa.field("response", pa.string())])
    parquet.write_table(pa.table([["a"], ["b"]], schema=schema), place / "pool.parquet")
    return lambda: read_pool(place / "pool.parquet")


def sparse(kind: str, file: str) -> Callable[[Path, Path], Callable[[], object]]:
    """A file that is a terabyte long and takes no room on the disk."""

    def make(place: Path, mark: Path) -> Callable[[], object]:
        copy, opened = FOLDERS[kind]
        folder = copy(place / kind)
        os.truncate(folder / file, 2**40)
        return lambda: opened(folder)

    return make


def sparse_data(name: str) -> Callable[[Path, Path], Callable[[], object]]:
    def make(place: Path, mark: Path) -> Callable[[], object]:
        (place / name).touch()
        os.truncate(place / name, 2**40)
        return lambda: read_pool(place / name)

    return make


def sb3_archive(place: Path, mark: Path) -> Callable[[], object]:
    with zipfile.ZipFile(place / "ppo.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data", "w") as file:
        for _ in range(9):
            file.write(b" " * 2**25)
    return lambda: SavedModel.read(place / "ppo.zip")


def sb3_view(place: Path, mark: Path) -> Callable[[], object]:
    """Weights that claim a terabyte over four bytes."""
    weights = io.BytesIO()
    torch.save({"weight": torch.zeros(1).expand(2**38)}, weights)
    return sb3_with(place, weights.getvalue(), {})


def sb3_wide(place: Path, mark: Path) -> Callable[[], object]:
    weights = io.BytesIO()
    torch.save({"weight": torch.zeros(8, 8)}, weights)
    opened = sb3_with(place, weights.getvalue(), {"net_arch": [10**9, 10**9]})

    def load() -> object:
        from raise_env.agents.sb3 import Sb3Agent

        opened()
        return Sb3Agent("PPO", load=place / "ppo.zip")

    return load


def sb3_with(place: Path, weights: bytes, policy_kwargs: dict[str, Any]) -> Callable[[], object]:
    notes = {
        "observation_space": {"_shape": [8, 39]},
        "action_space": {":type:": "<class 'gymnasium.spaces.multi_binary.MultiBinary'>"},
        "policy_kwargs": policy_kwargs,
    }
    with zipfile.ZipFile(place / "ppo.zip", "w") as archive:
        archive.writestr("data", json.dumps(notes))
        archive.writestr("policy.pth", weights)
    return lambda: SavedModel.read(place / "ppo.zip")


SIZE_CASES = [
    *(
        Case("packed bomb", f"ten gigabytes of {what}, {name}", data_of(name, functools.partial(ten_gigabytes, byte)))
        for what, byte in (("zeros", b"\0"), ("empty lines", b"\n"), ("brackets", b"["), ("one word", b"a"))
        for name in ("pool.jsonl.gz", "pool.json.gz", "pool.csv.gz")
    ),
    Case("packed bomb", "parquet, one row twenty thousand times", parquet_of_repeats),
    Case("packed bomb", "parquet, half a gigabyte in a page", parquet_page),
    Case("packed bomb", "archive of SB3", sb3_archive),
    *(
        Case("claimed size", f"{what}, {file} of a {kind}", lambda p, m, k=kind, f=file, c=content: planted(k, f, c)(p))
        for what, content in HEADERS.items()
        for kind, file in (
            ("model", "model.safetensors"),
            ("adapter", "adapter_model.safetensors"),
            ("selector", "model.safetensors"),
        )
    ),
    Case("claimed size", "model of a billion layers", says("model", num_hidden_layers=10**9)),
    Case("claimed size", "model of a million experts", says("model", num_local_experts=10**6)),
    Case("claimed size", "model of huge width", says("model", hidden_size=2**20, intermediate_size=2**20)),
    Case("claimed size", "model of a huge vocabulary", says("model", vocab_size=10**10)),
    Case("claimed size", "model with a width that is text", says("model", hidden_size="evil")),
    Case("claimed size", "adapter of huge rank", says("adapter", r=10**9)),
    Case("claimed size", "adapter of a scale beyond numbers", says("adapter", lora_alpha=10**400)),
    Case(
        "claimed size", "adapter's modules as an endless expression", says("adapter", target_modules="(a|a|.)*(.*)*x")
    ),
    Case("claimed size", "selector of huge networks", selector_says({"hidden_dims": [10**6, 10**6]})),
    Case("claimed size", "selector of a billion networks", selector_says({"num_networks": 10**9})),
    Case("claimed size", "selector of a million layers", selector_says({"hidden_dims": [1] * 10**6})),
    Case("claimed size", "selector with widths that are text", selector_says({"hidden_dims": ["a"]})),
    Case("claimed size", "SB3's weights over nothing", sb3_view),
    Case("claimed size", "SB3's policy of huge width", sb3_wide),
    Case("terabyte without content", "pool.jsonl", sparse_data("pool.jsonl")),
    Case("terabyte without content", "pool.json", sparse_data("pool.json")),
    Case("terabyte without content", "pool.csv", sparse_data("pool.csv")),
    Case("terabyte without content", "pool.parquet", sparse_data("pool.parquet")),
    *(
        Case("terabyte without content", f"{file} of a {kind}", sparse(kind, file))
        for kind, file in [
            *(("model", name) for name in ("config.json", "tokenizer_config.json")),
            ("adapter", "adapter_config.json"),
            ("selector", "config.json"),
            *(("bench", name) for name in ("results.jsonl", "episodes.jsonl")),
            ("run", "run.json"),
        ]
    ),
    *(
        Case("JSON beyond measure", f"{what} in a pool", data_of("pool.jsonl", lambda c=content: row_with(c)))
        for what, content in {
            "brackets, 100,000 deep": "[" * 100_000 + "]" * 100_000,
            "braces, 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
            "brackets, 500 deep": "[" * 500 + "]" * 500,
            "a number of 5,000 digits": "1" * 5000,
            "half a character": r'"\ud800"',
            "a name twice": '1, "extra": 2',
        }.items()
    ),
    *(
        Case(
            "JSON beyond measure",
            f"{what} in {file} of a {kind}",
            lambda p, m, k=kind, f=file, c=content: planted(k, f, c)(p),
        )
        for what, content in {
            "brackets, 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
            "a number of 5,000 digits": b'{"agent": ' + b"1" * 5000 + b"}",
            "a number beyond floats": b'{"agent": 1e999, "seed": 1e999, "task": 1e999}',
            "no UTF-8": b'{"agent": "\xff\xfe"}',
            "a name twice": b'{"agent": 1, "agent": 2}',
            "null": b"null",
        }.items()
        for kind, file in (
            ("model", "config.json"),
            ("adapter", "adapter_config.json"),
            ("selector", "config.json"),
            ("run", "run.json"),
            ("bench", "results.jsonl"),
            ("bench", "episodes.jsonl"),
        )
    ),
]


# Templates

TEMPLATES = {
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ prompt }}",
    "Python's insides by a filter": "{{ (prompt|attr('__class__')).__mro__ }}{{ prompt }}",
    "globals of a function": "{{ cycler.__init__.__globals__ }}{{ prompt }}",
    "context": "{{ self._TemplateReference__context.environment.globals }}{{ prompt }}",
    "a file": "{% include '/etc/passwd' %}{{ prompt }}",
    "an endless loop": "{% for i in range(10**12) %}x{% endfor %}{{ prompt }}",
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ prompt }}",
    "a long text": "{{ 'a' * 10**10 }}{{ prompt }}",
    "a wide format": "{{ '%1000000000d' % 1 }}{{ prompt }}",
    "a wide format's method": "{{ '{:1000000000}'.format(1) }}{{ prompt }}",
    "padding": "{{ prompt.ljust(10**9) }}",
    "padding by a filter": "{{ prompt|center(10**9) }}",
    "a power": "{{ 10**(10**9) }}{{ prompt }}",
    "doubled text": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ prompt }}",
    "doubled lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ prompt }}",
    "replaced text": "{% set n = namespace(x='a'*999) %}{% for i in range(30) %}{% set n.x = n.x.replace('a', n.x) %}"
    "{% endfor %}{{ prompt }}",
    "a text of itself": "{% set n = namespace(a=1) %}{% set n.a = n %}{{ n }}{{ prompt }}",
    "a macro of itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}{{ prompt }}",
    "a branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}"
    "{{ prompt }}",
    "joined text": "{{ ('a' * 99999)|list|join('a' * 99999) }}{{ prompt }}",
    "numbers joined": "{{ range(20000)|join('x' * 20000) }}{{ prompt }}",
    "numbers joined as they are made": "{{ ('x' * 20000).join(range(20000)|map('string')) }}{{ prompt }}",
    "replaced by name": "{{ ('a' * 20000)|replace(new='x' * 20000, old='a') }}{{ prompt }}",
    "replaced in a list": "{{ (range(20000)|list)|replace(',', 'x' * 20000) }}{{ prompt }}",
    "indented by name": "{{ ('a\\n' * 20000)|indent(first=true, width='x' * 20000) }}{{ prompt }}",
    "indented lines of another kind": "{{ ('a\\r' * 20000)|indent('x' * 20000, blank=true) }}{{ prompt }}",
    "indented JSON": "{{ (range(20000)|list)|tojson(indent='x' * 20000) }}{{ prompt }}",
    "JSON indented by a number": "{{ (range(99999)|list)|tojson(indent=1000) }}{{ prompt }}",
    "separated JSON": "{{ (range(20000)|list)|tojson(separators=('x' * 20000, ':')) }}{{ prompt }}",
    "a wide format in a list": "{{ ['%1000000000d']|format(1) }}{{ prompt }}",
    "long texts made one by one": "{{ range(1000)|map('string')|map('replace', '', 'x' * 200000)|list }}{{ prompt }}",
    "made-up words": "{{ lipsum(10**9) }}{{ prompt }}",
    "batches": "{{ [1]|batch(10**9, 'x')|list }}{{ prompt }}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}{{ prompt }}",
}


class Tokenizer:
    """As much of a tokenizer as a chat template needs."""

    is_fast = False
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_chat_template(self) -> str:
        return self.chat_template


def template_cases() -> list[Case]:
    row = Instruction("question", "answer")
    cases = []
    for name, template in TEMPLATES.items():

        def own(place: Path, mark: Path, template: str = template) -> Callable[[], object]:
            return lambda: PlainFrame(template, "").framed([row])

        def chat(place: Path, mark: Path, template: str = template) -> Callable[[], object]:
            return lambda: ChatFrame(Tokenizer(template)).framed([row])

        cases += [Case("template", f"{name}, own", own), Case("template", f"{name}, chat", chat)]
    return cases


CASES = [*pickle_cases(), *CODE_CASES, *PATH_CASES, *SIZE_CASES, *template_cases()]
IGNORED = [Case("pickle in parquet's own types", "prompt", parquet_extension, True)]


def marked(case: Case) -> Any:
    """The case as a parameter; what takes more than a second, and has a quicker one of its kind, is slow."""
    is_slow = case.kind == "packed bomb" and case.name != "ten gigabytes of zeros, pool.jsonl.gz"
    is_slow |= case.kind == "template" and case.name.endswith(", chat") and case.name.startswith(SLOW_TEMPLATES)
    is_slow |= case.kind == "terabyte without content" and case.name in ("pool.json", "pool.csv")
    marks = [pytest.mark.slow] if is_slow and "empty lines" not in case.name else []
    return pytest.param(case, marks=marks, id=f"{case.kind}: {case.name}")


SLOW_TEMPLATES = ("a branching macro", "doubled lists", "a text of itself", "loops within loops")


@pytest.mark.parametrize("case", [marked(case) for case in [*CASES, *IGNORED]])
def test_file_of_a_stranger__meaning_ill__is_refused_in_a_message(case: Case, tmp_path: Path) -> None:
    place, mark = tmp_path / "place", tmp_path / "mark"
    place.mkdir()
    opened = case.make(place, mark)
    begun = time.process_time()
    try:
        opened()
    except RaiseEnvError as error:
        message = str(error)
        assert len(message) > 20
    else:
        assert case.is_ignored, "it was opened"
    assert time.process_time() - begun < SECONDS
    assert not mark.exists(), "it ran"


#: Characters that a template may make of nothing take a few times as much while it is at work.
TEMPLATE_BYTES = 20_000_000


@pytest.mark.parametrize("is_chat", [False, True], ids=["own", "chat"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith(SLOW_TEMPLATES)])
def test_template__meaning_ill__is_refused_before_it_has_filled_the_memory(name: str, is_chat: bool) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            BoundedTemplate(TEMPLATES[name], is_chat=is_chat).render(prompt="question")
        assert tracemalloc.get_traced_memory()[1] < TEMPLATE_BYTES
    finally:
        tracemalloc.stop()


def test_malicious_files__counted__by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(case.kind for case in [*CASES, *IGNORED])
    with capsys.disabled():
        print()
        for kind, count in [*counts.items(), ("in all", counts.total())]:
            print(f"  {kind:<32}{count:>5}")
    assert counts.total() == len({(case.kind, case.name) for case in [*CASES, *IGNORED]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_selector__weight_that_is_not_finite__is_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = selector_copy(tmp_path / "selector") / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name] = weights[name].to(dtype)
    weights[name].view(-1)[0] = value
    save_file(weights, path)
    with pytest.raises(RecordError, match=f"'{name}' holds numbers that are not finite"):
        RaiseFork.load(path.parent)


# Commands


def command_cases() -> dict[str, Callable[[Path, bytes], list[str]]]:
    """Each command with a file that it reads; the content is put there."""

    def data(place: Path, content: bytes, name: str = "pool.jsonl") -> str:
        (place / name).write_bytes(content)
        return str(place / name)

    def folder(place: Path, content: bytes, kind: str, file: str) -> str:
        copied = FOLDERS[kind][0](place / kind)
        (copied / file).write_bytes(content)
        return str(copied)

    return {
        "split": lambda p, c: ["split", "--data", data(p, c), "--out", str(p / "out")],
        "train": lambda p, c: ["train", "--pool", data(p, c), "--dev", data(p, b"", "d.csv"), "--out", str(p / "out")],
        "train's parquet": lambda p, c: [
            *("train", "--pool", data(p, c, "pool.parquet"), "--dev", data(p, c, "d.csv"), "--out", str(p / "out")),
        ],
        "train's model": lambda p, c: ["train", "--model", folder(p, c, "model", "config.json"), "--out", str(p / "o")],
        "train's adapter": lambda p, c: [
            *("train", "--adapter", folder(p, c, "adapter", "adapter_config.json"), "--out", str(p / "out")),
        ],
        "train's SB3 model": lambda p, c: [
            *("train", "--agent", "sb3:PPO", "--agent-args", f"load={data(p, c, 'ppo.zip')}", "--out", str(p / "out")),
        ],
        "train's folder": lambda p, c: ["train", "--resume", "--out", folder(p, c, "run", "run.json")],
        "finetune": lambda p, c: [
            *("finetune", "--selector", folder(p, c, "selector", "model.safetensors"), "--out", str(p / "out")),
        ],
        "evaluate's data": lambda p, c: ["evaluate", "--model", "tiny", "--data", data(p, c)],
        "evaluate's model": lambda p, c: [
            *("evaluate", "--data", data(p, GOOD_ROWS.encode()), "--model", folder(p, c, "model", "model.safetensors")),
        ],
        "evaluate's adapter": lambda p, c: [
            *("evaluate", "--model", "tiny", "--data", data(p, GOOD_ROWS.encode())),
            *("--adapter", folder(p, c, "adapter", "adapter_model.safetensors")),
        ],
        "validate's records": lambda p, c: ["validate", data(p, c, "episodes.jsonl")],
        "validate's results": lambda p, c: ["validate", folder(p, c, "bench", "results.jsonl")],
        "leaderboard": lambda p, c: ["leaderboard", folder(p, c, "bench", "results.jsonl")],
        "bench's table": lambda p, c: ["bench", "--table", "--out", folder(p, c, "bench", "summary.json")],
        "bench's folder": lambda p, c: ["bench", "--resume", "--out", folder(p, c, "bench", "run.json")],
        "audit's folder": lambda p, c: ["audit", "--resume", "--out", folder(p, c, "bench", "run.json")],
    }


COMMANDS = command_cases()


@pytest.mark.parametrize("form", ["pickle", "torch", "\x1b[2J nonsense"])
@pytest.mark.parametrize("name", COMMANDS)
def test_command__file_that_means_ill__ends_with_one_message(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, mark = tmp_path / "\x1b]0;title\x07", tmp_path / "mark"  # a name that would rename the terminal's window
    place.mkdir()
    begun = time.process_time()
    with pytest.raises(SystemExit) as ended:
        cli.main(COMMANDS[name](place, pickles(mark).get(form, form.encode())))
    assert ended.value.code == cli.EXIT_USAGE
    assert time.process_time() - begun < 3 * SECONDS
    assert not mark.exists(), "it ran"
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "Traceback" not in said.err


# What a record may ask for


def record_of(**kwargs: Any) -> EpisodeRecord:
    value = {
        "schema_version": 1,
        "env": {"id": "RaiseSelect-v0", "kwargs": kwargs},
        "agent": "os:system",
        "seed": 0,
        "actions": [[0]],
        "rewards": [0.0],
        "dev_scores": [0.0, 0.0],
        "test_score": None,
        "versions": {},
        "content": {"model": "a", "pool": "b", "dev": "c"},
    }
    return EpisodeRecord.from_json(json.dumps(value), "here")


OPENED = ("model", "auxiliary_model", "adapter", "auxiliary_adapter", "pool", "dev", "test")


@pytest.mark.parametrize("name", OPENED)
def test_replay__file_that_nobody_allowed__is_refused_by_name(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text(GOOD_ROWS)
    needed = {"pool": str(tmp_path), "dev": str(tmp_path)} if name in ("dev", "test", "pool") else {}
    known = [] if name == "pool" else [str(tmp_path / "other")]
    record = record_of(**{**needed, name: str(secret)})
    with pytest.raises(RecordError, match=rf"replaying would open .*: .*{name} .*secret.* add .*--allow"):
        replay(record, allowed=known)


def test_replay__file_or_folder_that_is_allowed__is_opened(tmp_path: Path) -> None:
    for name, rows in (("pool", "abcdefgh"), ("dev", "xyz")):
        (tmp_path / f"{name}.jsonl").write_text(
            jsonl(*({"prompt": f"What is {row}?", "response": row} for row in rows))
        )
    pool, dev = str(tmp_path / "pool.jsonl"), str(tmp_path / "dev.jsonl")
    record = record_of(pool=pool, dev=dev, num_candidates=4, num_classes=1, batch_size=1, auxiliary_updates=0)
    for allowed in ([pool, dev], [str(tmp_path)]):
        difference, _ = replay(record, allowed=allowed)
        assert difference is not None
        assert difference.what == "content of model"  # it was opened, and is another
    with pytest.raises(RecordError, match=r"names: dev .*dev\.jsonl'\. If"):
        replay(record, allowed=[pool])


def test_replay__link_in_an_allowed_folder__leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(GOOD_ROWS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pool.jsonl").symlink_to(tmp_path / "secret.jsonl")
    pool = str(tmp_path / "mine" / "pool.jsonl")
    with pytest.raises(RecordError, match="would open what the record names: pool"):
        replay(record_of(pool=pool, dev=pool), allowed=[str(tmp_path / "mine")])


@pytest.mark.parametrize("name", ["pool", "dev", "test"])
@pytest.mark.parametrize("is_named", [False, True], ids=["in a folder that is", "by its own name"])
def test_replay__link_in_a_folder_of_data__leads_nowhere_else(name: str, is_named: bool, tmp_path: Path) -> None:
    for part in ("pool", "dev", "test"):
        (tmp_path / "mine" / part).mkdir(parents=True)
        (tmp_path / "mine" / part / "rows.jsonl").write_text(GOOD_ROWS.replace("Question", part))
    secret, link = tmp_path / "secret.jsonl", tmp_path / "mine" / name / "rows.jsonl"
    secret.write_text(link.read_text())
    link.unlink()
    link.symlink_to(Path("..", "..", "secret.jsonl"))
    (tmp_path / "mine" / name / "notes.txt").symlink_to(tmp_path)  # what is not read may lead anywhere
    sources = {part: str(tmp_path / "mine" / part) for part in ("pool", "dev", "test")}
    record = record_of(**sources, num_candidates=2, num_classes=1, batch_size=1, auxiliary_updates=0)
    allowed = [*sources.values()] if is_named else [str(tmp_path / "mine")]
    with pytest.raises(
        RecordError, match=rf"{name} '\S*mine\S*', by a link in it '\S*secret.jsonl'\. .*--allow \S*secret"
    ):
        replay(record, allowed=allowed)
    difference, _ = replay(record, allowed=[*allowed, str(secret)])
    assert difference is not None
    assert difference.what == "content of model"  # it was opened, and is another


def linked_model(cache: Path) -> Path:
    """The embedded model's folder as the hub's cache keeps it: each file a link."""
    (cache / "snapshots" / "1").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in BASE.iterdir() if path.is_file())):
        shutil.copy(path, cache / "blobs" / str(number))
        (cache / "snapshots" / "1" / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return cache / "snapshots" / "1"


def test_replay__models_folder_of_links__is_opened_by_its_own_name_or_with_what_they_lead_to(tmp_path: Path) -> None:
    model = linked_model(tmp_path / "hub")
    record = record_of(model=str(model), pool_size=64, num_dev=8, num_candidates=16, num_classes=2, auxiliary_updates=0)
    for allowed in ([str(model)], [str(tmp_path / "hub")], [str(model.parent), str(tmp_path / "hub" / "blobs")]):
        difference, _ = replay(record, allowed=allowed)
        assert difference is not None
        assert difference.what == "content of model"
    for name in ("model", "auxiliary_model", "adapter", "auxiliary_adapter"):
        with pytest.raises(RecordError, match=rf"{name} '\S*snapshots/1', by a link in it '\S*blobs/\d+'\. "):
            replay(record_of(**{name: str(model)}), allowed=[str(model.parent)])


@pytest.mark.parametrize("kind", ["folder", "circle"])
def test_replay__links_deep_in_a_models_folder__lead_nowhere_else(kind: str, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "templates").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "mine" / "model" / "templates").symlink_to(Path("..", "templates"))
    (tmp_path / "mine" / "templates" / "back").symlink_to(Path("..", "model"))
    target = {"folder": tmp_path / "secret", "circle": Path("a.jinja")}[kind]
    (tmp_path / "mine" / "templates" / "a.jinja").symlink_to(target)
    with pytest.raises(RecordError, match="would open what the record names: model"):
        replay(record_of(model=str(tmp_path / "mine" / "model")), allowed=[str(tmp_path / "mine")])


def test_replay__folders_that_link_to_each_other__are_looked_through_once(tmp_path: Path) -> None:
    for name, other in (("model", "templates"), ("templates", "model")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other").symlink_to(Path("..", other))
    with pytest.raises(ModelError, match="model"):  # it was opened, and there is nothing
        replay(record_of(model=str(tmp_path / "model")), allowed=[str(tmp_path)])


@pytest.mark.parametrize("name", [name for name in OPENED if name not in ("model", "auxiliary_model")])
def test_replay__name_of_the_embedded_model__allows_no_file_of_that_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = {"pool": "tiny", "dev": "tiny"} if name in ("pool", "dev", "test") else {}
    with pytest.raises(RecordError, match=rf"would open what the record names: .*{name} 'tiny'.*--allow tiny"):
        replay(record_of(**{**needed, name: "tiny"}))


def test_replay__name_too_long_for_a_file__is_refused() -> None:
    with pytest.raises(RecordError, match="would open what the record names: model"):
        replay(record_of(model="a" * 5000), allowed=["."])


def test_replay__name_of_the_hub__only_where_it_is_allowed() -> None:
    with pytest.raises(RecordError, match="--allow someone/model"):
        replay(record_of(model="someone/model"), allowed=["someone"])


@pytest.mark.parametrize("name", FOREIGN_LIMITS)
def test_replay__size_beyond_measure__is_refused_unless_the_caller_gives_it(name: str) -> None:
    huge = FOREIGN_LIMITS[name] * 4
    more = {"num_candidates": huge, "batch_size": 1} if name == "num_classes" else {}
    with pytest.raises(RecordError, match=f"the record's num_candidates|the record's {name} is"):
        replay(record_of(**{**more, name: huge}))


def test_replay__rank_or_modules_beyond_measure__are_refused() -> None:
    for lora in ({"r": 10**6}, {"target_modules": "(a|a|.)*(.*)*x"}):
        with pytest.raises(RecordError, match="lora"):
            replay(record_of(lora=lora))


@pytest.mark.parametrize(
    "modules", ["all-linear", "q_proj", r".*\.(q_proj|v_proj)", r"^model\..*\.q_proj$", ["a", "b"]]
)
def test_adapter__modules_by_name_or_simple_expression__are_taken(modules: Any, tmp_path: Path) -> None:
    folder = adapter_copy(tmp_path / "adapter")
    changed_json(folder, "adapter_config.json", target_modules=modules)
    assert adapter_settings(folder).target_modules == (tuple(modules) if isinstance(modules, list) else modules)


# Limits that a user can raise


def test_read_pool__packed_to_much_less__is_read_where_the_limit_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = json.dumps({"prompt": "a", "response": "b" * 1000}) + "\n"
    path = tmp_path / "pool.jsonl.gz"
    path.write_bytes(gzip.compress(row.encode() * 5000))
    assert len(read_pool(path)) == 5000  # small as it is, it may grow as it will
    monkeypatch.setenv("RAISE_ENV_MAX_BYTES", "1000000")
    with pytest.raises(DataError, match=r"packed into .*raise \$RAISE_ENV_MAX_BYTES"):
        read_pool(path)
    monkeypatch.setenv("RAISE_ENV_MAX_BYTES", "100000000")
    assert len(read_pool(path)) == 5000


def test_read_pool__line_of_ten_megabytes__is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 10**7, "response": "b"}) + "\n")
    assert len(read_pool(path)[0].prompt) == 10**7
    monkeypatch.setenv("RAISE_ENV_MAX_BYTES", str(2 * 10**6))
    with pytest.raises(DataError, match=r"line 1 has more than 2,000,000 bytes.*RAISE_ENV_MAX_BYTES"):
        read_pool(path)


@pytest.mark.parametrize("text", ["", "-1", "many", "0", "1e9", "9" * 30])
def test_max_bytes__variable_that_is_no_number__is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pool.jsonl").write_text(GOOD_ROWS)
    monkeypatch.setenv("RAISE_ENV_MAX_BYTES", text)
    with pytest.raises(SettingError, match=r"\$RAISE_ENV_MAX_BYTES"):
        read_pool(tmp_path / "pool.jsonl")


def test_read_pool__infinite_numbers__become_null_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"".join(row_with(value) for value in ("1e999", "-1e999", "NaN", "Infinity")))
    assert [row.fields["extra"] for row in read_pool(path)] == [None] * 4


def test_read_pool__header_of_a_million_columns__takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "pool.csv"
    path.write_text(",".join(f"c{i}" for i in range(10**6)) + "\n" + "1," * (10**6 - 1) + "1\n")
    begun = time.process_time()
    with pytest.raises(DataError, match="expected one of these forms"):
        read_pool(path)
    assert time.process_time() - begun < 3 * SECONDS


# Text that a terminal or a page would obey

OBEYED = "\x1b[31m \x1b]8;;http://evil.example\x07link\x1b]8;;\x07 \r\b \x9b2J \u202egnp.exe \u2066 \u2028 \ud800"


def test_printable__what_a_terminal_obeys__is_spelled_out() -> None:
    shown = printable(OBEYED + "\n\tplain äöü 漢字 😀")
    assert shown.isprintable() or set(shown) & {"\n", "\t"}
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert shown.endswith("\n\tplain äöü 漢字 😀")
    assert "\\x1b[31m" in shown
    assert "\\u202e" in shown
    shown.encode()


@pytest.mark.parametrize("error", [SettingError, DataError, ModelError, RecordError, OutputError])
def test_errors__what_they_show_of_a_file__is_not_obeyed(error: type[Exception]) -> None:
    assert all(character.isprintable() for character in str(error(f"found {OBEYED}")))


def test_validate__agents_name_that_a_terminal_would_obey__is_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads(record_of(pool_size=8, num_candidates=4, num_classes=1, batch_size=1).to_json())
    value["agent"] = OBEYED.replace("\ud800", "")
    (tmp_path / "episodes.jsonl").write_text(json.dumps(value))
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", str(tmp_path / "episodes.jsonl")])
    assert ended.value.code == cli.EXIT_NO
    said = capsys.readouterr().out
    assert "\\x1b[31m" in said
    assert all(character.isprintable() or character == "\n" for character in said)


def test_warning__name_that_a_terminal_would_obey__is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    cli._quieten()
    assert logging.lastResort is not None
    shown = logging.lastResort.format(logging.LogRecord("x", logging.WARNING, "", 0, "in %s", (OBEYED,), None))
    assert all(character.isprintable() for character in shown)


def test_markdown__what_would_break_a_table_or_make_a_link__stays_text() -> None:
    from raise_env.agents.markdown import table

    evil = "a | b\n# head [x](javascript:alert(1)) ![y](http://z) <script>alert(1)</script> `code` \x1b[2J"
    lines = table(["agent", evil], [[evil, "[0.1, 0.2]"]]).split("\n")
    assert len(lines) == 3
    assert all(line.count("|") - line.count("\\|") == 3 for line in (lines[0], lines[2]))
    bare = re.sub(r"\\.", "", lines[2])  # what no backslash stands before
    assert not [mark for mark in ("](", "<", ">", "`", "\x1b", "![") if mark in bare]
    assert lines[2].endswith("| [0.1, 0.2] |")


# Code of one's own


def test_main__working_folder__is_looked_into_only_where_own_code_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "app", lambda **_: seen.append(list(cli.sys.path)))
    for arguments, is_there in [
        (["info"], False),
        (["train", "--agent", "sb3:PPO", "--pool", "owner/name:train"], False),
        (["finetune", "--selector", "run:1/selector"], False),
        (["bench", "--agents", "random,raise_fork", "--agent-args", "raise_fork:num_states=3"], False),
        (["train", "--agent", "selector:runs/a"], False),
        (["train", "--agent", "my_module:Agent"], True),
        (["bench", "--agents", "random,mine=package.module:agent"], True),
        (["bench", "--agents", "placebo:my_module:Agent"], True),
        (["validate", "x", "--reward", "my_module:score"], True),
    ]:
        monkeypatch.setattr(cli.sys, "path", [entry for entry in cli.sys.path if entry not in ("", str(tmp_path))])
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert (str(tmp_path) in seen[-1]) == is_there, arguments


CHATS = {
    "ChatML": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "marked": "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n{% generation %}{{ m.content }}!"
    "{% endgeneration %}\n  {% else %}\n{{ m.role|upper }}: {{ m.content|trim }}\n{% endif %}\n{% endfor %}",
    "macros": "{%- macro shown(text, count=1) -%}[{{ text * count }}]{%- endmacro -%}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + loop.index %}{{ shown(m.content, 2) ~ ns.n }}{{ bos_token }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ messages|tojson(indent=2) }}{{ messages|length }}",
    "lists": "{% set roles = messages|map(attribute='role')|list %}{{ roles|join(', ') }}{{ (roles + ['x'])[-1] }}"
    "{{ {'a': [1, 2]}.get('a')|first }}{{ '%s-%d' % ('a', 3) }}{{ 'a,b'.split(',')|last }}"
    "{{ messages[0].content[::-1] }}"
    "{% if tools is none and messages[0]['role'] in ['user', 'system'] %}{{ dict(a=1)|dictsort }}{% endif %}",
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("is_open", [True, False])
def test_chat_template__in_bounds__gives_what_transformers_gives(name: str, is_open: bool) -> None:
    from raise_env.base_model import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = CHATS[name]
    chat = [{"role": role, "content": f' {role}s <say> "x" & ä😀\n'} for role in ("system", "user", "assistant")]
    frame = ChatFrame(tokenizer)
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_open)
    assert frame._rendered([chat], is_open=is_open) == [wanted]
    if frame.has_marks:
        whole = tokenizer.apply_chat_template([chat], return_dict=True, return_assistant_tokens_mask=True)
        tokens, masks = frame._tokenized([chat])
        assert tokens == whole["input_ids"]
        assert masks == [[bool(bit) for bit in mask] for mask in whole["assistant_masks"]]


# Results, runs and caches that were tampered with


COSTS = dict.fromkeys(("features", "preparation", "learning", "final"), 1.0)


def results_line(**values: Any) -> dict[str, Any]:
    parts = COSTS
    line = {"task": "t", "agent": "a", "seed": 0, "phi": 4.0, "phi_parts": parts, "tokens": parts, "seconds": parts}
    return {**line, "dev_loss": 1.0, "test_loss": 1.0, "diverged": False, "error": None, **values}


@pytest.mark.parametrize(
    "values",
    [
        *({"seed": seed} for seed in ("0", 1.5, True, None, [0])),
        *({"task": task} for task in (None, 1, ["a"])),
        *({name: value} for name in ("phi", "dev_loss", "test_loss") for value in ("1", [1], {}, 10**400)),
        *({"phi_parts": value} for value in (None, {}, {"final": "x"}, [1])),
        *({"seconds": value} for value in (None, 1, {"final": None})),
        {"error": 1},
        {"episode_returns": ["a"]},
        *({"phi": phi} for phi in (-4.0, 3.9, 4.001, 0)),
        *({name: {**COSTS, "final": -1e-9}} for name in ("phi_parts", "tokens", "seconds")),
        {"phi": 2.0, "phi_parts": {**COSTS, "learning": -1.0}},
    ],
    ids=str,
)
def test_read_bench__line_of_another_form__is_named(values: dict[str, Any], tmp_path: Path) -> None:
    folder = run_copy(tmp_path / "bench")
    (folder / "results.jsonl").write_text(json.dumps(results_line(**values)) + "\n")
    (folder / "episodes.jsonl").write_text(record_of().to_json() + "\n")
    with pytest.raises(RecordError, match=r"results\.jsonl, line 1: "):
        read_bench(folder)


def test_check_line__phi_of_parts_added_in_any_order__is_taken() -> None:
    check_line(results_line())
    check_line(results_line(phi=4.0 * (1 + 1e-9)))
    check_line(results_line(phi=0, phi_parts=dict.fromkeys(COSTS, 0)))


def test_whole_lines_and_records__binary_content__is_torn(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(record_of().to_json().encode() + b"\n\xff\xfe\n")
    assert len(whole_records(path)) == 1
    assert len(whole_lines(path)) == 1
    assert [record.seed for record in read_records_until_error(path)] == [0]


def read_records_until_error(path: Path) -> list[EpisodeRecord]:
    found = []
    with pytest.raises(RecordError, match="line 2 is not UTF-8"):
        found.extend(read_records(path))
    return found or [record_of()]


@pytest.mark.parametrize(
    "values",
    [{"plan": 1}, {"plan": {"entries": 1}}, {"seconds": [1]}, {"seconds": {"learning": "x"}}, {"versions": None}],
    ids=str,
)
def test_open__run_json_of_another_form__is_named(values: dict[str, Any], tmp_path: Path) -> None:
    before = {"command": "train", "plan": {}, "versions": {}, "start": "2026-01-01"}
    (tmp_path / "run.json").write_text(json.dumps({**before, **values}))
    with pytest.raises(RecordError, match=r"run\.json: the field '(plan|seconds|versions)' is not as promised"):
        open_run(tmp_path)

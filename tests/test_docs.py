"""What the documentation says is so: commands compose, files are named, what is public is described."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from adaptax import checking, subcommands, talk
from adaptax.compose import COMMANDS as NAMES
from adaptax.compose import check_arguments, find_conf, given_keys, teach_hydra
from adaptax.config import build, key_paths
from adaptax.manifest import step_of
from adaptax.models import FAMILIES
from adaptax.options import OPTIONS, take_options
from adaptax.resume import bring_config
from adaptax.schema import UserError, unknown_key

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "adaptax"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.rst"))]
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if "assets" not in path.parts]


def code_blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """(caption, text) of every block of a language, on a Markdown or reStructuredText page."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield block.partition("\n")[0].removeprefix("# ") if block.startswith("# ") else "", block
        return
    pattern = rf"^( *)\.\. code-block:: {language}\n((?:\1 +:\S.*\n)*)\n((?:\1 +.*\n|\n)+)"
    for indent, options, block in re.findall(pattern, text, re.MULTILINE):
        caption = re.search(r":caption: (\S+)", options)
        yield caption[1] if caption else "", re.sub(rf"^{indent}   ", "", block, flags=re.MULTILINE)


def shell_lines(text: str) -> list[list[str]]:
    """The commands of a shell block as words, with continued lines joined, and without where their output goes."""
    lines = [part for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    split = [shlex.split(line, comments=True) for line in lines]
    piped = [list(group) for words in split for is_pipe, group in itertools.groupby(words, "|".__eq__) if not is_pipe]
    return [words[: words.index(">")] if ">" in words else words for words in piped]


def find_arguments(words: list[str]) -> list[str] | None:
    """What follows ``python run_training.py`` or ``adaptax``, whatever stands before it; None for other commands."""
    for i in range(len(words)):
        if words[i : i + 2] == ["python", "run_training.py"]:
            return words[i + 2 :]
    words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))
    return words[1:] if words[:1] == ["adaptax"] else None


def documented_commands() -> dict[str, list[str]]:
    """Every documented run: where it was found first and the command -> its arguments."""
    found: dict[str, list[str]] = {}
    for page in (*PAGES, *sorted((ROOT / "conf").rglob("*.yaml"))):
        blocks = [block for _, block in code_blocks(page, "bash")]
        if page.suffix == ".yaml":
            blocks = re.findall(r"^#.*?(python run_training\.py.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        for words in (words for block in blocks for words in shell_lines(block)):
            arguments = find_arguments(words)
            if arguments is not None and arguments not in found.values():
                found[f"{page.relative_to(ROOT)}: {shlex.join(arguments)}"] = arguments
    return found


COMMANDS = documented_commands()
OF_A_RUN = ("checkpoints", "replay")  # commands that take a run's folder, and no configuration


def named_runs() -> set[Path]:
    """The folders and checkpoints of earlier runs that the commands name."""
    words = [argument for arguments in COMMANDS.values() for argument in arguments]
    resumed = {value for key, _, value in (word.partition("=") for word in words) if key == "checkpoint.resume"}
    listed = {arguments[1] for arguments in COMMANDS.values() if arguments[0] in OF_A_RUN}
    asked = [words[1:] for words in COMMANDS.values() if words[0] in OPTIONS]
    runs = {word.removeprefix("run=") for words in asked for word in words if re.match("run=|[^=-][^=]*$", word)}
    return {Path(name) for name in (resumed | listed | runs) - {"auto", "never"}}


def named_adapters() -> set[str]:
    """The folders of adapters that the commands name."""
    words = [word for arguments in COMMANDS.values() if arguments[0] in OPTIONS for word in arguments[1:]]
    given = [re.fullmatch(r"adapter=(.+)|adapters=\[(.+)\]", word) for word in words]
    names = [name for match in given if match for name in (match[1] or match[2]).split(",")]
    return set(names) - {"best", "last", "none", "null"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: ``conf`` with the YAML files that the pages tell to write, the named data and earlier runs."""
    teach_hydra()
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(find_conf(), folder / "conf")
    for caption, block in (item for page in PAGES for item in code_blocks(page, "yaml")):
        if caption.endswith(".yaml"):
            (folder / caption).parent.mkdir(parents=True, exist_ok=True)
            (folder / caption).write_text(block, encoding="utf-8")
    for name in ("chats", "more", "held_out"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (folder / "checkpoints/my-gemma").mkdir(parents=True)
    (folder / "checkpoints/my-gemma/config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    for path in named_runs():
        (folder / path).mkdir(parents=True, exist_ok=True)
        run = folder / path if step_of(path) is None else folder / path.parents[1]
        (run / "config.yaml").write_text("model: {}\ndata: {train: chats.jsonl}\n", encoding="utf-8")
        for name in ("adapter", "adapters/best", "adapters/last"):
            (run / name).mkdir(parents=True, exist_ok=True)
    for name in named_adapters():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def first_values(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first job."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{o.key_or_group}={next(iter(o.sweep_string_iterator()))}" if o.is_sweep_override() else str(o.input_line)
        for o in parsed
    ]


def compose(arguments: list[str], folder: Path) -> dict[str, Any]:
    """The configuration of a command line's (first) job, as plain values."""
    if arguments[:1] and arguments[0] in NAMES:
        own = argparse.ArgumentParser(allow_abbrev=False)
        for option in {"preview": ("--rows", "--html"), "verify-resume": ("--steps", "--at")}.get(arguments[0], ()):
            own.add_argument(option)
        _, arguments = own.parse_known_args(arguments[1:])
    options = get_args_parser().parse_intermixed_args(check_arguments(arguments))
    overrides = first_values(options.overrides) if options.multirun else list(options.overrides)
    if options.config_dir:
        overrides.append(f"hydra.searchpath=[file://{folder / options.config_dir}]")
    with hydra.initialize_config_dir(config_dir=str(folder / "conf"), version_base="1.3"):
        cfg = hydra.compose(config_name="config", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def check_command(command: str, arguments: list[str], folder: Path) -> None:
    """Refuses what a command after training would refuse before it reads an adapter or a weight."""
    is_choice = lambda name: (folder / "conf/data" / f"{name}.yaml").is_file()  # noqa: E731
    options, overrides = take_options(OPTIONS[command], arguments, is_choice)
    _, places = subcommands.resolve(options, compose(overrides, folder), given_keys())
    if command == "generate":
        talk.check_out(options)
    if command == "export":
        assert options.out is not None
        assert places != [None]
        assert options.format == "peft" or not options.uniform


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_documented_command_composes(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--help" in arguments:
        return
    monkeypatch.chdir(folder)
    if arguments[0] in OF_A_RUN:
        assert not arguments[2:] or arguments[2] == "--step"
        return
    if arguments[0] in OPTIONS:
        return check_command(arguments[0], arguments[1:], folder)
    values = bring_config(compose(arguments, folder), given_keys())
    if "--cfg" in arguments and values["data"]["train"] is None:
        values["data"]["train"] = "chats.jsonl"  # showing a configuration needs no data
    config = build(values)
    if config.model.model_family in FAMILIES:  # newmodel stands for one that is yet to be written
        checking.check_model(config)


WRONG = (
    "generate outputs/support promt=hi",
    "generate outputs/support prompt=hi model.lora_rnak=4",
    "generate outputs/support data=questions.jsonl",
    "generate run=outputs/nowhere",
    "evaluate outputs/support compare=best",
    "evaluate outputs/support evaluation.metric=exact",
    "export run=outputs/support format=onnx out=here",
    "inspect outputs/support energy=2",
)


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_would_be_noticed(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    name, *arguments = command.split()
    with pytest.raises(UserError):
        check_command(name, arguments, folder)


SWEEPS = [a for a in COMMANDS.values() if "--multirun" in a[1:]]


@pytest.mark.parametrize("arguments", SWEEPS, ids=shlex.join)
def test_sweep_option_may_follow_overrides(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run_training.py"), *arguments, "data.train=missing.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error in job 0: data.train=missing.jsonl: no such file" in result.stderr


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 40
    assert ["+experiment=quickstart"] in COMMANDS.values()
    assert any(arguments[:1] == ["model=custom"] for arguments in COMMANDS.values())
    assert set(NAMES) - {"train"} <= {arguments[0] for arguments in COMMANDS.values()}


def test_documented_keys_exist() -> None:
    keys = set(key_paths())
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for group, key in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", text):
            if group in keys:
                assert f"{group}.{key}" in keys, f"{page.name}: {unknown_key(f'{group}.{key}', keys)}"


def test_documented_modules_and_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module in re.findall(r"python -m (adaptax[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"
        for names in re.findall(r"pip install -e '\.\[([\w,]+)\]'", text):
            assert set(names.split(",")) <= set(extras), f"{page.name}: {names}"


def test_every_configuration_file_is_on_a_page() -> None:
    included = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"\.\. literalinclude:: (\S+)", page.read_text(encoding="utf-8"))
    }
    assert set((ROOT / "conf").rglob("*.yaml")) <= included


def test_every_metric_is_on_its_page() -> None:
    text = (ROOT / "docs/guide/outputs.rst").read_text(encoding="utf-8")
    code = "".join((SOURCE / name).read_text(encoding="utf-8") for name in ("train.py", "recorder.py"))
    written = set(re.findall(r'"((?:train|eval|checkpoint)_\w+)":', code))
    assert written == set(re.findall(r"\* - ``((?:train|eval|checkpoint)_\w+)``", text))


def test_every_public_module_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.rst"))
    modules = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if any(public_definitions(path))
    }
    assert modules == set(re.findall(r"\.\. automodule:: (\S+)", pages))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_is_public_is_described(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "the module has no docstring"
    missing = [name for name, node in public_definitions(path) if not ast.get_docstring(node)]
    assert not missing, f"no docstring: {', '.join(missing)}"


def public_definitions(path: Path) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Public functions and classes of a module, and the public methods of these classes."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def readme_tree() -> list[Path]:
    """The paths of the README's annotated tree."""
    block = next(text for _, text in code_blocks(ROOT / "README.md", "text") if text.startswith("run_training.py"))
    paths: list[Path] = []
    parents: list[Path] = [ROOT]
    for line in filter(str.strip, block.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        paths.append(parents[depth] / name)
        parents[depth + 1 :] = [paths[-1]]
    return paths


def test_readme_tree_is_the_tree() -> None:
    listed = readme_tree()
    missing = [str(path) for path in listed if not path.exists()]
    assert not missing, f"the README lists what is not there: {missing}"
    folders = {path for path in listed if path.is_dir() and not any(other.parent == path for other in listed)}
    files = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    unlisted = [str(f.relative_to(ROOT)) for f in files if f not in listed and not folders & set(f.parents)]
    assert not unlisted, f"the README's tree lacks {unlisted}"


@pytest.mark.slow
def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="needs the docs extra")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

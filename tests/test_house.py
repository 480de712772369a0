"""The house: what lies where, what imports what, how long functions are, what documents say."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import ddpm
from machinery import command_line
from tools import distill, evaluate, exchange, play, report, steps, unpack

pytestmark = pytest.mark.quick

STORY = ("ddpm", "modules", "utils")
FOLDERS = ("machinery", "tools", "benchmarks")
FILES = {name: ROOT / f"{name}.py" for name in STORY} | {
    f"{folder}.{path.stem}": path
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
# the program of a documented command -> its commands and limits
PROGRAMS = {
    "ddpm.py": ({"train": ddpm.train, "sample": ddpm.sample}, ddpm.LIMITS),
    "tools.unpack": ({"unpack": unpack.unpack}, unpack.LIMITS),
    "tools.evaluate": ({"evaluate": evaluate.evaluate}, evaluate.LIMITS),
    "tools.play": ({"play": play.play}, play.LIMITS),
    "tools.exchange": (
        {"publish": exchange.publish, "export": exchange.export, "import": exchange.import_},
        {},
    ),
    "tools.report": ({"report": report.report}, {}),
    "tools.steps": ({"steps": steps.steps}, steps.LIMITS),
    "tools.distill": ({"distill": distill.distill}, distill.LIMITS),
}


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports, by their names in FILES."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys()


def code_lines(function: ast.FunctionDef) -> int:
    """How long a function is without its signature and its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


# ---- files and imports ---------------------------------------------------------------------------


def test_the_top_level_has_three_python_files():
    assert {path.stem for path in ROOT.glob("*.py")} == set(STORY)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("machinery.")])
def test_machinery_imports_none_of_the_story(name):
    assert all(other.startswith("machinery.") for other in imports_of(FILES[name]))


@pytest.mark.parametrize(
    "folder, forbidden", [("tools", ("benchmarks",)), ("ddpm", ("tools", "benchmarks"))]
)
def test_nothing_points_up(folder, forbidden):
    for name, path in FILES.items():
        if name.startswith(folder):
            assert not any(other.startswith(forbidden) for other in imports_of(path))


def test_no_imports_go_round_in_a_circle():
    left = {name: imports_of(path) for name, path in FILES.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


# ---- size ----------------------------------------------------------------------------------------


def flag_lines(command: ast.FunctionDef) -> int:
    """How long the signature and the docstring of a command are: its flags and their help."""
    return command.end_lineno - command.lineno + 1 - code_lines(command)


def test_the_story_is_read_in_an_evening():
    """The flags and their help are looked up, not read."""
    lines = {name: len(FILES[name].read_text().splitlines()) for name in STORY}
    commands = [
        node
        for node in ast.parse(FILES["ddpm"].read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name in ("train", "sample")
    ]
    assert sum(lines.values()) - sum(map(flag_lines, commands)) <= 1150, lines


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_a_screen(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= 60, f"{node.name} in {name}"


# ---- documents -----------------------------------------------------------------------------------


def commands_in(path: Path) -> list[str]:
    """The lines of all fenced bash blocks that start one of our programs."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split("&&|;", line)]
    return [part for part in parts if re.match(r"(python3? |torchrun ).*(ddpm\.py|-m tools)", part)]


DOCUMENTED = [(path.name, command) for path in DOCUMENTS for command in commands_in(path)]


@pytest.mark.parametrize("document, command", DOCUMENTED)
def test_every_documented_command_is_understood(document, command):
    """Planned, not run: a flag that was renamed cannot go stale in a document."""
    words = shlex.split(command, comments=True)
    program = next(word for word in words if word in PROGRAMS)
    commands, limits = PROGRAMS[program]
    rest = words[words.index(program) + 1 :]
    if "--help" in rest:
        return
    if len(commands) == 1:
        rest = [*commands, *rest]
    planned = command_line.plan(program, commands, rest)
    flags = dict(zip(planned.func.__code__.co_varnames, planned.args, strict=False))
    command_line.check_limits(flags, limits)


def test_there_are_documented_commands():
    """So that the test above does not pass because none is found any more."""
    assert len(DOCUMENTED) > 30
    assert {name for name, _ in DOCUMENTED} >= {"README.md", "training.md", "sampling.md"}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_a_document_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize(
    "word",
    [
        "EMA weights",
        "class-conditional",
        "classifier-free guidance",
        "CFG",
        "image-to-image",
        "SDEdit",
        "inpainting",
        "mask",
        "fine-tuning",
        "mixed precision",
        "bfloat16",
        "gradient accumulation",
        "micro-batch",
        "gradient checkpointing",
        "activation checkpointing",
        "multi-GPU",
        "distributed",
        "FID",
        "Frechet distance",
        "precision",
        "recall",
        "memorization",
        "resume",
        "checkpoint",
        "reproducible",
        "min-SNR",
        "gamma",
    ],
)
def test_the_words_people_search_for_are_found(word):
    text = "\n".join(path.read_text() for path in DOCUMENTS).lower()
    assert word.lower() in text

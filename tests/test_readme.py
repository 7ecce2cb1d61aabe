"""Every README: its commands name what exists, its links lead somewhere, its Python runs, its tables are right."""

import ast
import functools
import importlib
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from mla_lm.attention import KINDS
from mla_lm.config import TrainConfig, register_schema
from mla_lm.keys import key_names
from mla_lm.model.size import ModelSize, model_size
from mla_lm.study.declaration import StudyConfig, declared
from mla_lm.terminal import cli
from tests.conftest import ROOT
from tests.kinds import preset_of

MOST_LINES, LONGEST_LINE = 220, 120
FOLDERS = ("conf", "mla_lm", "scripts", "tests")
PAGES = [
    page.relative_to(ROOT)
    for page in (
        ROOT / "README.md",
        ROOT / "data" / "README.md",
        *sorted(ROOT.glob(".github/*.md")),
        *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
    )
]
GROUPS = [folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir() and folder.name != "hydra"]
KEYS = [*key_names(TrainConfig), *key_names(StudyConfig)]
NOT_OURS = ("do_sample",)  # keys of other libraries
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """Each command of a page's bash blocks as words, the program without its folder."""
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for separate, part in itertools.groupby(words, lambda word: word == "&&"):
            if not separate:
                program, *rest = itertools.takewhile(lambda word: word != "<", part)
                yield [Path(program).name, *(word for word in rest if "..." not in word)]


def check_command(words: list[str]) -> None:
    """Fail where a command names a module, an option, a key or a file that does not exist."""
    match words:
        case ["python", "train.py", *arguments]:
            check_training(arguments)
        case ["python", "-m", "pytest", *arguments]:
            check_pytest(arguments)
        case ["python", "-m", module, *arguments] if module.startswith("scripts."):
            check_tool(module, arguments)
        case ["python", "-c", code]:
            ast.parse(code)
        case ["pip", "install", *packages]:
            check_packages(packages)
        case ["sbatch", script, *overrides]:
            assert (ROOT / script).is_file()
            check_training(overrides)
        case ["wandb", "sweep", file]:
            assert (ROOT / file).is_file()


def check_training(arguments: list[str]) -> None:
    register_schema()
    cli.check_arguments(arguments, GROUPS)
    overrides = [argument for argument in arguments if argument != "-m"]
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(overrides)
    ]
    for number in range(max(map(len, values), default=1)):  # each value of each list, not all combinations
        check_composed(tuple(of_key[number % len(of_key)] for of_key in values))


@functools.cache
def check_composed(overrides: tuple[str, ...]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", list(overrides), return_hydra_config=True)
    with open_dict(composed):
        del composed.hydra
    cli.check_keys(composed, TrainConfig)
    config: TrainConfig = OmegaConf.to_object(composed)
    config.check()


def check_tool(module: str, arguments: list[str]) -> None:
    values = vars(parse_of(module, arguments))
    if "overrides" in values:
        check_training(values["overrides"])
    if module == "scripts.study":
        declared(ROOT / "conf", values["name"], [word for word in values["settings"] if not word.startswith("hydra")])


def parse_of(module: str, arguments: list[str]) -> Any:
    package = (ROOT / module.replace(".", "/")).is_dir()
    parse = importlib.import_module(f"{module}.__main__" if package else module).parse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        return parse()


def check_pytest(arguments: list[str]) -> None:
    markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    for option, value in itertools.pairwise(arguments):
        if option == "-m":
            assert set(re.findall(r"\w+", value)) - {"and", "or", "not"} <= set(markers), value


def check_packages(packages: list[str]) -> None:
    for option, value in itertools.pairwise(["", *packages]):
        if option == "-r":
            assert (ROOT / value).is_file(), value
        if extra := re.fullmatch(r"\.\[(\w+)\]", value):
            assert extra[1] in PROJECT["project"]["optional-dependencies"], value


@every_page
def test_commands_name_what_exists(page):
    for words in commands(page):
        check_command(words)


@every_page
def test_keys_options_and_flags_in_the_text_exist(page, capsys):
    for code in inline_code(page):
        words = code.split()
        if all(re.match(r"[a-z][\w.]*=", word) for word in words):
            for word in words:
                check_key(*word.split("=", 1))
        elif re.fullmatch(rf"({'|'.join(GROUPS)})(\.[a-z_]+)+", code) and not code.endswith((".py", ".yaml")):
            assert any(f"{key}.".startswith(f"{code}.") for key in KEYS), code
        elif tool := re.match(r"(?:python -m )?(scripts\.\w+)(?: ([a-z]+))?", code):
            with pytest.raises(SystemExit):
                parse_of(tool[1], [tool[2], "--help"] if tool[1] == "scripts.bench" and tool[2] else ["--help"])
            options = capsys.readouterr().out
            assert all(flag in options for flag in re.findall(r"--[\w-]+", code)), code


def check_key(key: str, value: str) -> None:
    options = [file.stem for file in (ROOT / "conf" / key).glob("*.yaml")]
    if key in GROUPS and re.fullmatch(r"[a-z]\w*", value):
        assert value in options, f"{key}={value}"
    known = key in KEYS or key in GROUPS or key in NOT_OURS or key.startswith("hydra.")
    assert known or key in ("group", "key"), f"{key}={value}"  # the words for any of them


@every_page
def test_files_of_the_code_exist(page):
    named = {code for code in inline_code(page) if re.fullmatch(r"[a-z_./]+\.(py|cpp|sbatch)", code)}
    assert [name for name in named if not (ROOT / name).exists() and not any(ROOT.glob(f"*/**/{name}"))] == []


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            file = ROOT / page.parent / path if path else ROOT / page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(file: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_lines_are_short(page):
    long = [line for line in prose(page).splitlines() if len(line) > LONGEST_LINE and not line.startswith(("|", "!["))]
    assert not long


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


def test_python_of_the_front_page(runs, capsys):
    (code,) = blocks(Path("README.md"), "python")
    path = re.search(r'load_run\("(.*)"\)', code)[1]
    names: dict = {}
    exec(code.replace(path, str(runs / "mla")), names)
    assert names["out"].shape == (2, 1, 256)
    assert capsys.readouterr().out.startswith(f"256 {names['cache'].nbytes}\n")
    assert names["logits"].shape[-1] == names["run_config"].model.vocab_size
    assert len(names["ids"]) == 20


def test_python_of_the_architecture():
    (code,) = blocks(Path("mla_lm/README.md"), "python")
    names: dict = {}
    exec(code, names)
    assert names["out"].shape == (2, 256, 256)


@pytest.mark.e2e
@pytest.mark.e2e
def test_the_attention_needs_torch_alone():
    """`from mla_lm import MLA, MLAConfig` loads none of the training packages."""
    script = (
        "import sys; from mla_lm import MLA, MLAConfig; "
        "print({'lightning', 'hydra', 'omegaconf', 'datasets', 'tokenizers', 'wandb', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_every_key_is_there_with_its_default():
    rows = re.findall(r"^\| `([a-z][\w.]*)` \| `(.*?)` \| (.+) \|$", (ROOT / "conf" / "README.md").read_text(), re.M)
    defaults = {key: default for key, default, _ in rows if not key.startswith("hydra.")}
    assert set(defaults) == set(KEYS)
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train")
    study = OmegaConf.structured(StudyConfig)
    for key, shown in defaults.items():
        owner = study if key in key_names(StudyConfig) else config
        if OmegaConf.is_missing(owner, key):
            assert shown == "???", key
            continue
        default = OmegaConf.select(owner, key)
        default = OmegaConf.to_container(default) if OmegaConf.is_config(default) else default
        assert (float(shown) if isinstance(default, float) else yaml.safe_load(shown)) == default, key


def test_every_option_is_there():
    text = (ROOT / "conf" / "README.md").read_text()
    options = [file.stem for group in GROUPS for file in (ROOT / "conf" / group).glob("*.yaml")]
    assert [option for option in options if f"`{option}`" not in text and not is_preset(option)] == []


def is_preset(option: str) -> bool:
    """Of the kinds and sizes that are named apart."""
    return bool(re.fullmatch(f"({'|'.join(KINDS)})_(tiny|small|medium|large)", option))


def size_of(preset: str, vocab_size: int, window: int | None = None) -> ModelSize:
    return model_size(replace(preset_of(preset), vocab_size=vocab_size), window)


def test_the_sizes_of_the_result():
    text = (ROOT / "README.md").read_text()
    for kind in ("mla", "mla_shared", "mla_qk_norm", "mqa", "gqa", "mha"):
        size = size_of(f"{kind}_small", 4096, window=640)  # the mean of short and long windows
        assert f"{size.parameters / 1e6:.1f}M parameters and {size.flops_per_token / 1e6:.1f}M FLOPs per token" in text
        name = f"(`{kind}`)" if "_" in kind else f"| {kind.upper()}"
        assert f"{name} | {size.cache_bytes_per_token(4, torch.bfloat16):,} |" in text.replace("*", "")


def test_the_table_of_presets():
    text = (ROOT / "conf" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+|-) \|$", text, re.M)
    assert [kind for kind, *_ in rows] == list(KINDS)
    for kind, *shown in rows:
        for size, elements in zip(("tiny", "small", "medium", "large"), shown, strict=True):
            if (ROOT / "conf" / "model" / f"{kind}_{size}.yaml").exists():
                assert elements == f"{size_of(f'{kind}_{size}', 50257).cache_elements_per_token_per_layer:,}"
            else:
                assert elements == "-"

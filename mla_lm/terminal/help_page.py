"""What `python train.py --help` says of the configuration's groups (its template: conf/hydra/help/page.yaml)."""

from pathlib import Path

from omegaconf import OmegaConf

from mla_lm.terminal.tables import table

PACKAGE = "# @package"  # a directive of Hydra, on a line that looks like a comment


def register_options(conf: Path) -> None:
    """Let `${options:}` in a configuration stand for `describe_options` of this folder."""
    OmegaConf.register_new_resolver("options", lambda: describe_options(conf), replace=True)


def describe_options(conf: Path) -> str:
    """A line for every option of every group, described by the first comment of its file; `*` marks the defaults.

    Args:
        conf: has train.yaml, whose defaults name the groups, and a folder for each group with a file for each option
    """
    blocks = []
    for default in OmegaConf.load(conf / "train.yaml").defaults:
        for group, chosen in default.items() if OmegaConf.is_dict(default) else ():
            if not group.startswith("override hydra/"):
                files = sorted((conf / group).glob("*.yaml"))
                rows = [(f"{'*' if file.stem == chosen else ' '} {file.stem}", _description(file)) for file in files]
                blocks.append(f"{group}=\n{table(rows, left=2)}")
    return "\n\n".join(blocks)


def _description(file: Path) -> str:
    for line in file.read_text().splitlines():
        if line.startswith("# ") and not line.startswith(PACKAGE):
            return line.removeprefix("# ").replace("$", "$$")  # a single one means a variable to Hydra's template
    return ""

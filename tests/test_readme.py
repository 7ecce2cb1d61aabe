"""The README's Python runs, and `mla_lm` needs torch alone."""

import re
import subprocess
import sys

from tests.conftest import ROOT, succeeded


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_python_of_the_readme(train, tmp_path, capsys):
    succeeded(train("hydra.run.dir=run"))
    standalone, block, loading = python_blocks()
    names: dict = {}
    exec(standalone, names)
    assert names["out"].shape == (2, 1, 256)
    assert capsys.readouterr().out == f"256 {names['cache'].nbytes}\n"
    exec(block, names)
    assert names["out"].shape == (2, 256, 256)
    path = re.search(r'load_run\("(.*)"\)', loading)[1]
    exec(loading.replace(path, str(tmp_path / "run")), names)
    assert names["logits"].shape[-1] == names["run_config"].model.vocab_size
    assert len(names["ids"]) == 20


def test_the_attention_needs_torch_alone():
    """`from mla_lm import MLA, MLAConfig` loads none of the training packages."""
    script = (
        "import sys; from mla_lm import MLA, MLAConfig; "
        "print({'lightning', 'hydra', 'omegaconf', 'datasets', 'tokenizers', 'wandb'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_every_command_of_the_readme_names_what_exists():
    """Modules and config options that the README's commands name are there."""
    text = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"python -m scripts\.(\w+)", text)):
        assert any((ROOT / "scripts" / name).is_file() for name in (f"{module}.py", f"{module}/__main__.py")), module
    for group, option in re.findall(r"\b(model|data|debug|logger|schedule)=(\w+)", text):
        assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), f"{group}={option}"

"""The harness gives a run the numbers that it gives the exported run through its own HFLM.

All but the mistakes need lm-eval and accelerate: pip install -r requirements-eval.txt accelerate
"""

import json
import sys
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_lm import AttentionConfig, load_run
from mla_lm.data.config import TokenizerConfig
from mla_lm.data.tokenizer import build_tokenizer, encode
from mla_lm.errors import UserError
from mla_lm.interop.hf.folder import export_run
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal import cli
from scripts import evaluate
from tests.conftest import Result, call_main, refused, succeeded
from tests.interop.hf.models import make_run

SEQ_LEN = 96
TEXT = Path(json.__file__).read_text()
TOKENIZER = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [TEXT])
MODELS = {
    "mla": AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=8, nope_dim=8),
    "gqa": AttentionConfig(kind="gqa", num_kv_heads=2),
}
LONG = TEXT[:1000]  # a multiple of seq_len
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl, train: FOLDER/choice.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
num_fewshot: 1
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3}
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/until.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" ", "e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
REMOTE = """
task: local_remote
dataset_path: nobody/has-this
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""
WRONG = ROLLING.replace("local_rolling", "local_wrong").replace("{{text}}", "{{txet}}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a run and its export for each of MODELS, and tasks."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # for HFLM
    import datasets

    folder = tmp_path_factory.mktemp("harness")
    for name, attention in MODELS.items():
        make_run(folder / name, attention, vocab_size=300)
        RunFolder(folder / name).write_tokenizer(TOKENIZER)
        export_run(folder / name, folder / f"{name}-exported")
    lines = [line for line in TEXT.splitlines() if len(line) > 20][:12]
    choices = [
        {"question": f"{line[:n]}?", "choices": [line[n:], "x", line[:7] * 3], "answer": n % 3}
        for n, line in enumerate(lines, 5)
    ]
    write(folder / "choice.jsonl", [*choices, {"question": LONG, "choices": ["a", "b c", "d"], "answer": 1}])
    write(folder / "rolling.jsonl", [{"text": text} for text in (LONG, *lines[:3])])
    model = ours(folder, "mla")
    (answer,) = model.generate_until(instances("generate_until", (lines[0], {"until": [" ", "e"], "max_gen_toks": 12})))
    write(folder / "until.jsonl", [{"text": text, "answer": answer} for text in (*lines, LONG)])
    for task in (CHOICE, ROLLING, UNTIL, REMOTE, WRONG):
        name = task.split()[1]
        (folder / "tasks" / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(arguments)]


def ours(folder: Path, name: str):
    from mla_lm.inference.lm_eval import RunLM

    return RunLM(load_run(folder / name))


def theirs(folder: Path, name: str):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder / f"{name}-exported"), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(params=MODELS, scope="module")
def pair(request, folder) -> tuple:
    return ours(folder, request.param), theirs(folder, request.param)


def manager(folder: Path):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder / "tasks", include_defaults=False)


def numbers(metrics: dict) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def close(actual: list | dict, expected: list | dict) -> None:
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_loglikelihood(pair):
    contexts = ("def ", "import json  ", "", " ", "The answer is", LONG, LONG[-150:])
    requests = [(context, text) for context in contexts for text in ("self", " x", "return None", " " + LONG[:60])]
    pairs = product("ABCDEFGHIJKL", map(chr, range(33, 127)))
    requests += [pair for pair in pairs if len(encode(TOKENIZER, "".join(pair))) == 2]  # see the test of those of one
    actual, expected = (model.loglikelihood(instances("loglikelihood", *requests)) for model in pair)
    close([value for value, _ in actual], [value for value, _ in expected])
    greedy = [likely for _, likely in expected]
    assert [likely for _, likely in actual] == greedy
    assert 0 < sum(greedy) <= 12


def test_loglikelihood_rolling(pair):
    texts = [(text,) for text in (LONG, "", "a", LONG[:300], LONG[:150])]
    actual, expected = (model.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for model in pair)
    close(actual, expected)


def test_generate_until(pair):
    few, many = {"until": [" ", "e"], "max_gen_toks": 12}, {"until": "\n\n", "do_sample": False, "max_gen_toks": 40}
    prompts = [(text, options) for text in ("def ", "a", LONG, "import json", "") for options in (few, many, {**few})]
    actual, expected = (model.generate_until(instances("generate_until", *prompts)) for model in pair)
    assert actual == expected
    assert len(set(actual)) > 5
    whole = pair[0].generate_until(instances("generate_until", *((text, {"max_gen_toks": 12}) for text, _ in prompts)))
    assert any(len(text) < len(unstopped) for text, unstopped in zip(actual, whole, strict=True))


def test_tasks(folder):
    from lm_eval import simple_evaluate

    from mla_lm.inference.lm_eval_tasks import evaluate_tasks

    names = ["local_choice", "local_rolling", "local_until"]
    actual = evaluate_tasks(load_run(folder / "mla"), names, manager(folder))
    expected = simple_evaluate(theirs(folder, "mla"), tasks=names, task_manager=manager(folder), log_samples=False)
    assert actual["versions"] == expected["versions"]
    assert actual["n-shot"] == expected["n-shot"] == {"local_choice": 1, "local_rolling": 0, "local_until": 0}
    for name in names:
        close(numbers(actual["results"][name]), numbers(expected["results"][name]))
    assert 0 < actual["results"]["local_until"]["exact_match,none"] < 1
    assert 0 < actual["results"]["local_choice"]["acc,none"] < 1


@given(data=st.data())
@settings(max_examples=20)
def test_requests_do_not_depend_on_each_other(folder, data):
    """In whatever batch, and whoever shares its context, each has the sum of its own log-probabilities."""
    model = ours(folder, "mla")
    texts = st.text("ab de\n", max_size=12)
    contexts = data.draw(st.lists(texts, min_size=1, max_size=4))
    requests = data.draw(st.lists(st.tuples(st.sampled_from(contexts), texts), min_size=1, max_size=12))
    model.batch_size = data.draw(st.integers(1, 4))
    answers = model.loglikelihood(instances("loglikelihood", *requests))
    for request, (value, likely) in zip(requests, answers, strict=True):
        context, ids = model._encode_pair(*request)
        with torch.no_grad():
            logits = model.model(torch.tensor([context + ids]))[0, len(context) - 1 : -1].log_softmax(-1)
        assert value == pytest.approx(sum(logits[i, token].item() for i, token in enumerate(ids)), rel=1e-5, abs=1e-4)
        assert likely == (logits.argmax(-1).tolist() == ids)


def test_in_the_precision_of_the_run(folder):
    model, requests = ours(folder, "mla"), [("def ", "self"), ("def ", "None:"), (LONG, " x"), ("a", "b")]
    exact = [value for value, _ in model.loglikelihood(instances("loglikelihood", *requests))]
    model.precision = "bf16-mixed"
    rounded = [value for value, _ in model.loglikelihood(instances("loglikelihood", *requests))]
    assert rounded == pytest.approx(exact, rel=0.1)
    assert rounded != pytest.approx(exact, rel=1e-5)


def test_a_shared_context_is_read_once(folder):
    model, read = ours(folder, "mla"), []
    model.model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    context, choices = "def loads(s, cls=None, object_hook=None):\n    return", [" a", " bc", " def", " g"]
    model.loglikelihood(instances("loglikelihood", *((context, choice) for choice in choices)))
    longest = max(len(encode(TOKENIZER, choice)) for choice in choices)
    assert sum(read) == len(encode(TOKENIZER, context)) + len(choices) * longest


def test_a_continuation_of_no_tokens_of_its_own(folder):
    model = ours(folder, "mla")
    a, b = next(pair for pair in product(ascii_lowercase, repeat=2) if len(encode(TOKENIZER, "".join(pair))) == 1)
    requests = [("", ""), ("a", ""), (a, b)]
    nothing, also, (value, _) = model.loglikelihood(instances("loglikelihood", *requests))
    assert nothing == also == (0.0, True)
    assert value < 0


def test_sampling(folder):
    """temperature is for do_sample alone; the seed is torch's."""
    model = ours(folder, "mla")

    def text(**options) -> str:
        torch.manual_seed(1)
        return model.generate_until(instances("generate_until", ("def ", {"max_gen_toks": 20, **options})))[0]

    assert text(do_sample=True, temperature=1.0) == text(temperature=1.0) != text()
    assert text(do_sample=False, temperature=1.0) == text() == text(do_sample=True, temperature=1.0, top_k=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_gen_toks": SEQ_LEN}, ("max_gen_toks=96", "96 tokens")),
        ({}, ("max_gen_toks=256",)),  # the harness's default
        ({"num_beams": 4, "max_gen_toks": 8}, ("num_beams", "top_k")),
    ],
)
def test_what_the_model_cannot_generate(folder, options, words):
    with pytest.raises(UserError) as error:
        ours(folder, "mla").generate_until(instances("generate_until", ("a", options)))
    assert all(word in str(error.value) for word in words)


def test_a_continuation_longer_than_the_model_reads(folder):
    with pytest.raises(UserError, match="the model reads 96"):
        ours(folder, "mla").loglikelihood(instances("loglikelihood", ("a", LONG)))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("local_chioce", "unknown task local_chioce; did you mean local_choice?"),
        ("local_remote", "local_remote cannot be loaded"),
        ("local_wrong", "'txet' is undefined"),
    ],
)
def test_tasks_that_cannot_be(folder, monkeypatch, task, words):
    from mla_lm.inference.lm_eval_tasks import evaluate_tasks

    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(UserError) as error:
        evaluate_tasks(load_run(folder / "mla"), [task], manager(folder))
    assert words in str(error.value)
    assert ("cannot be reached" in str(error.value)) == (task == "local_remote")


# the command


def run(folder: Path, *arguments: str) -> Result:
    return call_main(lambda: cli.run(evaluate.main), ["evaluate", "mla", *arguments], folder)


def test_the_command(folder):
    tasks = ("--tasks", "local_choice,local_rolling", "--include-path", "tasks", "--limit", "5", "--json", "out.json")
    result = succeeded(run(folder, *tasks))
    figures = json.loads((folder / "out.json").read_text())
    assert figures["results"]["local_choice"]["acc_stderr,none"] > 0
    assert figures["versions"]["local_choice"] == 3
    assert figures["n-samples"]["local_choice"] == {"original": 13, "effective": 5}
    assert figures["config"]["model"]["seq_len"] == SEQ_LEN
    assert f"{figures['results']['local_rolling']['bits_per_byte,none']:.4f}" in result.stdout
    assert f"{figures['results']['local_choice']['acc_norm,none']:.4f}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--tasks", "a", "--files", "*.txt"), "--files"),
        (("--tasks", "a", "--stride", "8"), "--stride"),
        (("--tasks", "a", "--by-position"), "--by-position"),
        (("--tasks", "a", "--limit", "0"), "--limit 0"),
        (("--limit", "5"), "--tasks"),
        (("--include-path", "tasks"), "--tasks"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, arguments, word):
    refused(run(tmp_path, *arguments), word)


def test_a_folder_of_tasks_that_is_not_there(folder):
    refused(run(folder, "--tasks", "local_choice", "--include-path", "tsaks"), "--include-path tsaks")


def test_without_lm_eval(tmp_path, monkeypatch):
    make_run(tmp_path / "mla", MODELS["mla"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    for module in ("lm_eval", "lm_eval_tasks"):
        monkeypatch.delitem(sys.modules, f"mla_lm.inference.{module}", raising=False)
    refused(run(tmp_path, "--tasks", "hellaswag"), "lm-eval", "pip install -r requirements-eval.txt")

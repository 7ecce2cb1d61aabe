"""The datamodule under a real Trainer: what Lightning is handed, step by step."""

import lightning as L
import pytest
import torch

from mla_lm.config import TrainConfig
from mla_lm.data.config import DataConfig, TokenizerConfig
from mla_lm.data.open_store import open_store
from mla_lm.data.windows import Order
from mla_lm.errors import UserError
from mla_lm.training.datamodule import TextDataModule

SEQ_LEN = 16


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of the text\n" for i in range(600)))
    config = TrainConfig(tokens_per_step=8 * SEQ_LEN, micro_batch_tokens=4 * SEQ_LEN)
    config.model.seq_len = SEQ_LEN
    config.trainer.max_steps = 6
    config.data = DataConfig(
        source="text",
        files=str(tmp_path / "a.txt"),
        cache_dir=str(tmp_path / "cache"),
        tokenizer=TokenizerConfig(kind="bytes"),
        val_tokens=10 * SEQ_LEN,
    )
    return config


class Recorder(L.LightningModule):
    """Keeps the batches it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.train_batches, self.val_batches, self.test_batches = [], [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch)

    def test_step(self, batch, batch_idx):
        self.test_batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(config, tmp_path):
    return L.Trainer(
        max_steps=config.trainer.max_steps,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_are_whole_steps_in_the_order_of_the_seed(config, tmp_path, num_workers):
    config.data.num_workers = num_workers
    module = TextDataModule(config, open_store(config.data))
    model = Recorder()
    trainer(config, tmp_path).fit(model, module)
    tokens = module.store.tokens("train")
    assert len(model.train_batches) == 6
    for step, batch in enumerate(model.train_batches):
        indices = Order([len(module.train_windows)], [1.0], config.seed).of_step(step, 8)
        expected = [tokens[i * SEQ_LEN : i * SEQ_LEN + SEQ_LEN + 1].tolist() for i in indices.tolist()]
        assert batch.tolist() == expected
        assert batch.dtype == torch.int64


def test_a_run_goes_on_with_the_step_it_is_told(config, tmp_path):
    store = open_store(config.data)
    whole, rest = Recorder(), Recorder()
    trainer(config, tmp_path).fit(whole, TextDataModule(config, store))
    later = TextDataModule(config, store)
    later.start_step = 4
    trainer(config, tmp_path).fit(rest, later)
    assert len(later.train_dataloader()) == 6
    assert [b.tolist() for b in rest.train_batches[:2]] == [b.tolist() for b in whole.train_batches[4:]]


def test_evaluation_covers_the_sample_and_the_whole_test_split(config, tmp_path):
    module = TextDataModule(config, open_store(config.data))
    model = Recorder()
    runner = trainer(config, tmp_path)
    runner.validate(model, module, verbose=False)
    runner.test(model, module, verbose=False)
    assert max(len(batch) for batch in model.val_batches) == config.micro_batch_size == 4
    assert sum(int((batch[:, 1:] >= 0).sum()) for batch in model.val_batches) == config.data.val_tokens
    targets = torch.cat([batch[:, 1:].flatten() for batch in model.test_batches])
    assert targets[targets >= 0].tolist() == module.store.tokens("test")[1:].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_evaluation_without_repeating_a_window(config, world_size):
    class OneOf(TextDataModule):
        world_size = rank = 0

    store = open_store(config.data)
    windows = []
    for rank in range(world_size):
        module = OneOf(config, store)
        module.rank, module.world_size = rank, world_size
        windows += [window.tolist() for batch in module.test_dataloader() for window in batch]
    everything = [window.tolist() for window in module.test_windows]
    assert sorted(windows) == sorted(everything)


def test_a_training_split_shorter_than_a_window_is_refused(config):
    config.model.seq_len = 100_000
    with pytest.raises(UserError, match=r"train split.*model\.seq_len=100000"):
        TextDataModule(config, open_store(config.data))

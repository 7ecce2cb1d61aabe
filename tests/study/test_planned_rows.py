"""The rows of a study: what is matched, and with what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.attention import KINDS
from mla_lm.errors import UserError
from mla_lm.model.size import model_size
from mla_lm.study.declaration import declared
from mla_lm.study.planned_rows import MATCHED, PlannedRow, Planner, matching_width
from tests.conftest import ROOT
from tests.kinds import preset_of

CONF = ROOT / "conf"


def rows_of(name: str, *overrides: str) -> dict[str, PlannedRow]:
    return {row.name: row for row in Planner(declared(CONF, name, list(overrides)), CONF).rows()}


def test_every_kind_is_a_row_of_equal_parameters_and_tokens():
    rows = rows_of("attention")
    baseline = rows["mha_small"]
    for kind in KINDS:
        row = rows[f"{kind}_small"]
        assert "parameters" in row.views
        assert row.tokens == baseline.tokens == 7_372_800
        assert row.steps == 3600
        assert row.baseline == ("mha_small" if kind != "mha" else None)
        assert abs(row.sizes.parameters / baseline.sizes.parameters - 1) <= MATCHED


def test_the_view_by_cache_has_an_mla_of_the_cache_and_the_parameters_of_another_kind():
    rows = rows_of("attention")
    for kind in ("gqa", "mqa"):
        row, other = rows[f"mla_small-cache_of_{kind}"], rows[f"{kind}_small"]
        sizes = row.sizes
        assert sizes.cache_elements_per_token_per_layer == other.sizes.cache_elements_per_token_per_layer
        assert abs(sizes.parameters / other.sizes.parameters - 1) <= MATCHED
        assert (row.baseline, row.rate_of, row.views) == (other.name, "mla_small", ["cache"])
        assert "cache" in other.views


def test_the_view_by_flops_reuses_rows_that_are_equal_and_shortens_the_others():
    rows = rows_of("attention", "views=[parameters,flops]", "kinds=[mha,gqa,'mla model.ff_hidden=1200']")
    assert rows["gqa_small"].views == ["parameters", "flops"]
    longer = rows["mla_small-ff_hidden1200"]
    row = rows["mla_small-ff_hidden1200-flops_of_mha"]
    assert longer.views == ["parameters"]
    assert row.steps < longer.steps
    assert row.sizes.parameters == longer.sizes.parameters
    assert row.flops == pytest.approx(rows["mha_small"].flops, rel=1e-3)
    assert (row.rate_of, row.baseline) == (longer.name, "mha_small")


def test_all_kinds_have_the_steps_of_the_baseline_on_a_gpu():
    rows = rows_of("attention", "trainer=gpu", "kinds=[mla,mha]", "sizes=[tiny,small]", "cache_of=[]", "variants=[]")
    sizes = (("tiny", 4096), ("small", 8192))
    names = [f"{kind}_{size}-tokens_per_step{tokens}" for size, tokens in sizes for kind in ("mla", "mha")]
    assert list(rows) == names
    for row, tokens in zip(rows.values(), (4096, 4096, 8192, 8192), strict=True):
        assert row.config.tokens_per_step == tokens
        assert f"tokens_per_step={tokens}" in row.overrides


def test_mha_that_is_rotated_as_mla_is_stands_beside_it():
    rows = rows_of("attention", "kinds=[mla,mha]")
    row, mla, mha = rows["mha_small-rope_dim16"], rows["mla_small"], rows["mha_small"]
    assert row.config.model.layer_config().rotated_dim == mla.config.model.layer_config().rotated_dim
    assert (row.baseline, row.rate_of) == ("mha_small", "mha_small")
    assert row.sizes == mha.sizes


def test_the_frontier_varies_the_latent_and_nothing_else():
    rows = rows_of("latent_frontier", "kinds=[mla,mha]")
    variants = [row for row in rows.values() if row.rate_of]
    assert len({row.sizes.cache_elements_per_token_per_layer for row in variants} | {80}) == 9
    for row in variants:
        attention = row.config.model.attention
        assert attention.nope_dim + attention.rope_dim == attention.value_dim
        assert abs(row.sizes.parameters / rows["mha_small"].sizes.parameters - 1) <= MATCHED
        assert row.rate_of == "mla_small"


def test_scaling_gives_each_size_tokens_by_its_parameters_the_same_for_all_kinds():
    rows = rows_of("scaling", "kinds=[mla,mha]")
    sizes = ("tiny", "small", "small-num_layers8")
    assert list(rows) == [f"{kind}_{size}" for size in sizes for kind in ("mla", "mha")]
    for size in sizes:
        mla, mha = rows[f"mla_{size}"], rows[f"mha_{size}"]
        assert mla.tokens == mha.tokens == pytest.approx(3 * mha.sizes.parameters, rel=1e-2)
        assert mla.config.model.seq_len == 256


def test_the_smoke_study_is_small():
    study = declared(CONF, "smoke", [])
    rows = rows_of("smoke")
    tuned = [row for row in rows.values() if row.rate_of is None and row.kind in study.tuning.kinds]
    seeds = sum(len(study.seeds_for(row.kind)) for row in rows.values())
    assert seeds + len(tuned) * study.tuning.most <= 20
    assert {row.kind for row in rows.values()} == set(KINDS)


@given(st.integers(16, 300), st.integers(0, 2_000_000))
def test_matching_width_is_the_nearest_multiple(latent, more):
    model = preset_of("mla_tiny")
    model.vocab_size = 512
    model.attention.kv_compressed_dim = latent
    wanted = model_size(model).parameters + more
    model.ff_hidden = matching_width(model, wanted)
    step = 3 * model.d_model * model.num_layers * 8
    assert model.ff_hidden % 8 == 0
    assert abs(model_size(model).parameters - wanted) <= step / 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sizes=[huge]"], ["_huge", "small", "tiny"]),
        (["sizes=[small,small]"], ["mla_small", "twice"]),
        (["kinds=[mla,mha]", "variants=['mla model.attention.kv_compressed_dim=9999']"], ["without any feed-forward"]),
    ],
)
def test_mistakes(overrides, words):
    with pytest.raises(UserError) as error:
        rows_of("attention", *overrides)
    assert all(word in str(error.value) for word in words), error.value
